"""SignRound on one linear layer, y = W x, as its paper writes it: every weight on its own, gradients by hand.

value = (q - z) * s, q = clamp(round(w / s + z + V)); rounding passes gradients as if it were not there, clamping passes none where it acts.
Full-range symmetric (z = 0, s = -extreme / 8) or asymmetric, 4 bits, scales in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tests.references.rounding import f32, half_even

LOW, HIGH = -8, 7
ONE = f32(1)


@dataclass
class Group:
    """Weights that share a scale, and what is tuned about them."""

    weights: list[np.float32]
    offsets: list[np.float32]
    low: np.float32 = ONE
    high: np.float32 = ONE


def fit(group: Group, symmetric: bool) -> tuple[np.float32, int, float, float, float, float, bool]:
    """Scale, zero, the slopes of the scale by the two factors, those of the zero (before its clamp), and whether that clamp is idle."""
    smallest, largest = min(group.weights), max(group.weights)
    if symmetric:
        low, high = f32(smallest * group.low), f32(largest * group.high)
        if high >= -low:
            return f32(high / f32(LOW)), 0, 0.0, float(largest) / LOW, 0.0, 0.0, True
        return f32(low / f32(LOW)), 0, float(smallest) / LOW, 0.0, 0.0, 0.0, True
    low, high = min(f32(smallest * group.low), f32(0)), max(f32(largest * group.high), f32(0))
    scale = f32(f32(high / f32(15)) - f32(low / f32(15)))
    raw = half_even(f32(f32(LOW) - f32(low / scale)))
    low_slope, high_slope = float(smallest) if low < 0 else 0.0, float(largest) if high > 0 else 0.0
    by_low, by_high = -low_slope / 15, high_slope / 15
    zero_by_low = -low_slope / float(scale) + float(low) / float(scale) ** 2 * by_low
    zero_by_high = float(low) / float(scale) ** 2 * by_high
    return scale, min(max(raw, LOW), HIGH), by_low, by_high, zero_by_low, zero_by_high, LOW <= raw <= HIGH


def codes(group: Group, symmetric: bool) -> tuple[list[int], np.float32, int, list[bool]]:
    """Codes, scale, zero, and for each code whether its clamp was idle."""
    scale, zero = fit(group, symmetric)[:2]
    raw = [half_even(f32(f32(f32(w / scale) + f32(zero)) + v)) for w, v in zip(group.weights, group.offsets, strict=True)]
    return [min(max(q, LOW), HIGH) for q in raw], scale, zero, [LOW <= q <= HIGH for q in raw]


def values(group: Group, symmetric: bool) -> list[float]:
    found, scale, zero, _ = codes(group, symmetric)
    return [float(f32(q - zero) * scale) for q in found]


def step(group: Group, gradient: list[float], rate: float, symmetric: bool) -> None:
    """One step of signed descent from the loss's gradient by the values."""
    scale, _, scale_by_low, scale_by_high, zero_by_low, zero_by_high, zero_free = fit(group, symmetric)
    found, _, zero, free = codes(group, symmetric)
    by_low = by_high = 0.0
    for i, g in enumerate(gradient):
        for which, (scale_by, zero_by) in enumerate(((scale_by_low, zero_by_low), (scale_by_high, zero_by_high))):
            zero_slope = zero_by if zero_free else 0.0
            code_slope = (-float(group.weights[i]) / float(scale) ** 2 * scale_by + zero_slope) if free[i] else 0.0
            slope = g * ((code_slope - zero_slope) * float(scale) + (found[i] - zero) * scale_by)
            by_low, by_high = (by_low + slope, by_high) if which == 0 else (by_low, by_high + slope)
        group.offsets[i] = clamp(group.offsets[i] - f32(rate * sign(g * float(scale) if free[i] else 0.0)), -0.5, 0.5)
    group.low = clamp(group.low - f32(rate * sign(by_low)), 0, 1)
    group.high = clamp(group.high - f32(rate * sign(by_high)), 0, 1)


def sign(x: float) -> float:
    return 0.0 if x == 0 else math.copysign(1.0, x)


def clamp(x: np.float32, low: float, high: float) -> np.float32:
    return f32(min(max(float(x), low), high))


def tune(
    weight: np.ndarray, group: int, x: np.ndarray, y: np.ndarray, iterations: int, symmetric: bool
) -> tuple[list[float], list[list[list[int]]]]:
    """Losses and codes (row by row, group by group) of the start and after every step; every step sees all rows."""
    rows = [
        [Group(list(row[i : i + group]), [f32(0)] * group) for i in range(0, len(row), group)] for row in weight.astype(f32)
    ]
    losses, history = [], []
    for iteration in range(iterations + 1):
        now = np.array([[v for g in row for v in values(g, symmetric)] for row in rows])
        error = x @ now.T - y
        losses.append(float((error**2).mean()))
        history.append([[q for g in row for q in codes(g, symmetric)[0]] for row in rows])
        slope = 2 * error.T @ x / error.size
        for r, row in enumerate(rows):
            for i, g in enumerate(row):
                step(g, slope[r, i * group : (i + 1) * group].tolist(), (1 - iteration / iterations) / iterations, symmetric)
    return losses, history
