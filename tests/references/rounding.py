"""The number formats as they are defined: for every weight, look at every value that the format has and take the nearest.

All arithmetic is float32, one operation at a time, in the order that the module docstrings of `qwench.numerics` state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

f32 = np.float32
Matrix = list[list[float]]

E2M1 = [f32(v) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
E4M3 = [f32(m * 2.0**-9) for m in range(8)] + [f32((8 + m) * 2.0 ** (e - 10)) for e in range(1, 16) for m in range(8)][:-1]
"""Magnitudes of E4M3 by code: subnormals, then normals; the last code is NaN."""


def nearest(value: np.float32, magnitudes: Sequence[np.float32]) -> int:
    """Index of the magnitude nearest to |value|, the even index of two that are as near."""
    size = float(abs(value))
    distances = [abs(size - float(m)) for m in magnitudes]
    least = min(distances)
    candidates = [i for i, d in enumerate(distances) if d == least]
    return next((i for i in candidates if i % 2 == 0), candidates[0])


def signed(value: np.float32, index: int) -> int:
    """An FP4 code: the sign of the weight, even where it rounds to zero."""
    return (8 if np.signbit(value) else 0) | index


def nvfp4(weight: np.ndarray, outer: np.float32, factors: Sequence[float] = (1.0,)) -> tuple[list[list[int]], Matrix]:
    """Codes and block scales (as values) of a matrix."""

    def scales(amax: np.float32) -> list[np.float32]:
        raw = f32(f32(amax / f32(6)) * outer)
        clamped = [min(max(f32(raw * f32(f)), f32(2.0**-6)), f32(448)) for f in factors]
        return [E4M3[nearest(c, E4M3)] for c in clamped]

    return _blocks(weight, 16, scales, lambda s: f32(s / outer))


def mxfp4(weight: np.ndarray, shifts: Sequence[int] = (0,)) -> tuple[list[list[int]], Matrix]:
    """Codes and E8M0 exponents of a matrix."""

    def exponents(amax: np.float32) -> list[np.float32]:
        if amax == 0:
            return [f32(1)] * len(shifts)
        mantissa, power = np.frexp(float(amax))  # in [0.5, 1)
        power = int(power) - 1 + (1 if mantissa >= 0.875 else 0)
        return [f32(min(max(127 + power - 2 + s, 1), 252)) for s in shifts]

    return _blocks(weight, 32, exponents, lambda e: f32(2.0 ** (float(e) - 127)))


def _blocks(
    weight: np.ndarray,
    size: int,
    candidates: Callable[[np.float32], list[np.float32]],
    as_value: Callable[[np.float32], np.float32],
) -> tuple[list[list[int]], Matrix]:
    codes: list[list[int]] = []
    scales: Matrix = []
    for row in weight.astype(f32):
        code_row: list[int] = []
        scale_row: list[float] = []
        for start in range(0, len(row), size):
            block = row[start : start + size]
            best, least = None, None
            for stored in candidates(max(abs(v) for v in block)):
                scale = as_value(stored)
                block_codes = [signed(v, nearest(min(f32(abs(v) / scale), f32(6)), E2M1)) for v in block]
                error = sum(
                    (float(E2M1[c & 7]) * float(scale) - abs(float(v))) ** 2 for c, v in zip(block_codes, block, strict=True)
                )
                if least is None or error < least:
                    best, least = (block_codes, stored), error
            assert best is not None
            code_row += best[0]
            scale_row.append(float(best[1]))
        codes.append(code_row)
        scales.append(scale_row)
    return codes, scales


def half_even(value: np.float32) -> int:
    return int(np.rint(value))


def integer(
    weight: np.ndarray, bits: int, group: int, kind: str, store: Callable[[np.float32], np.float32]
) -> tuple[list[list[int]], Matrix, list[list[int]]]:
    """Codes, scales and zero points. `kind`: `symmetric`, `full_range` or `asymmetric`; `store` rounds a scale to its dtype."""
    low_code, high_code = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes, scales, zeros = [], [], []
    for row in weight.astype(f32):
        code_row, scale_row, zero_row = [], [], []
        for start in range(0, len(row), group):
            values = row[start : start + group]
            low, high = min(values), max(values)
            zero = 0
            if kind == "full_range":
                scale = store(f32((high if high >= -low else low) / f32(low_code)))
            elif kind == "symmetric":
                scale = store(f32(max(high, -low) / f32(high_code + 0.5)))
            else:
                low, high = min(low, f32(0)), max(high, f32(0))
                steps = f32(2**bits - 1)
                scale = store(f32(f32(high / steps) - f32(low / steps)))
                zero = min(max(half_even(f32(f32(low_code) - f32(low / scale))), low_code), high_code)
            for v in values:
                code_row.append(min(max(half_even(f32(f32(v / scale) + f32(zero))), low_code), high_code))
            scale_row.append(float(scale))
            zero_row.append(zero)
        codes.append(code_row)
        scales.append(scale_row)
        zeros.append(zero_row)
    return codes, scales, zeros


def fp8(weight: np.ndarray, block: tuple[int, int], store: Callable[[np.float32], np.float32]) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 values (not codes) and scales of a matrix, in blocks that may be partial at the edges."""
    rows, columns = weight.shape
    values = np.zeros((rows, columns), f32)
    scales = np.zeros((-(-rows // block[0]), -(-columns // block[1])), f32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = store(f32(np.abs(weight[part]).max() / f32(448)))
            quotients = weight[part].astype(f32) / scales[i, j]
            values[part] = [[np.copysign(E4M3[nearest(min(abs(q), f32(448)), E4M3)], q) for q in row] for row in quotients]
    return values, scales
