"""AWQ's search as its paper writes it, on a gated MLP: numpy, one weight after the other, no sharing of anything."""

from __future__ import annotations

import numpy as np

from tests.references.rounding import f32, integer


def rounded(weight: np.ndarray, group: int) -> np.ndarray:
    """INT4 with signed scales in float32, decoded."""
    codes, scales, _ = integer(weight, 4, group, "full_range", lambda scale: scale)
    return np.array([[c * s[i // group] for i, c in enumerate(row)] for row, s in zip(codes, scales, strict=True)], f32)


def mlp(gate: np.ndarray, up: np.ndarray, down: np.ndarray, x: np.ndarray) -> np.ndarray:
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def scales_of(gate: np.ndarray, up: np.ndarray, x: np.ndarray, ratio: float, duo: bool, group: int) -> list[float]:
    columns = x.shape[1]
    activity = [sum(abs(float(v)) for v in x[:, i]) / len(x) for i in range(columns)]
    raw = []
    for i in range(columns):
        s = activity[i] ** ratio
        if duo:
            size, rows = 0.0, 0
            for weight in (gate, up):
                for row in weight:
                    start = i // group * group
                    size += abs(float(row[i])) / (max(abs(float(v)) for v in row[start : start + group]) + 1e-6)
                    rows += 1
            s /= (size / rows) ** (1 - ratio) + 1e-4
        raw.append(max(s, 1e-4))
    live = [s for s, a in zip(raw, activity, strict=True) if a > 0]
    middle = (max(live) * min(live)) ** 0.5
    return [s / middle if a > 0 else 1.0 for s, a in zip(raw, activity, strict=True)]


def loss(gate: np.ndarray, up: np.ndarray, down: np.ndarray, x: np.ndarray, scales: list[float], group: int) -> float:
    """Inputs are divided, weights multiplied and rounded."""
    s = np.array(scales, f32)
    got = mlp(rounded(gate * s, group), rounded(up * s, group), down, x / s)
    return float(((got - mlp(gate, up, down, x)) ** 2).mean())


def search(
    gate: np.ndarray, up: np.ndarray, down: np.ndarray, x: np.ndarray, group: int, duo: bool
) -> tuple[float, list[tuple[float, float, list[float]]]]:
    """The loss at 1, and (ratio, loss, scales) of the 19 other candidates."""
    ratios = [i / 18 for i in range(19)] if duo else [(i + 1) / 19 for i in range(19)]
    tried = []
    for ratio in ratios:
        scales = scales_of(gate, up, x, ratio, duo, group)
        tried.append((ratio, loss(gate, up, down, x, scales, group), scales))
    return loss(gate, up, down, x, [1.0] * x.shape[1], group), tried


def clip(weight: np.ndarray, x: np.ndarray, group: int) -> np.ndarray:
    """The limit of each group, looked for token by token."""
    limits = np.zeros((len(weight), weight.shape[1] // group), f32)
    for r, row in enumerate(weight):
        for g in range(limits.shape[1]):
            part, tokens = row[g * group : (g + 1) * group], x[:, g * group : (g + 1) * group].astype(float)
            largest, best = np.abs(part).max(), None
            for step in range(11):
                limit = f32(largest * f32(1 - step / 20))
                difference = rounded(np.clip(part, -limit, limit)[None], group)[0].astype(float) - part
                error = sum(float(token @ difference) ** 2 for token in tokens)
                if best is None or error < best:
                    best, limits[r, g] = error, limit
    return limits
