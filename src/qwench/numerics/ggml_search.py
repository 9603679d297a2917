"""How the scale of a group is chosen: the searches of llama.cpp's quantizers, for many groups at once.

Every search tries a fixed list of steps around the plain one, fits the scale to the codes that each gives by weighted least squares, and keeps the best. The weights
say how much each value's error counts. Written from the arithmetic of ggml's reference quantizers (ggml/src/ggml-quants.c), whose results it repeats bit by bit: hence
float32 throughout, each product in their order, and sums that run down a group one value after the other. (Where a compiler fuses a product and a sum into one
rounding, as it does on ARM, llama.cpp itself differs in last bits from what it does on x86-64.)

Arrays are [values of a group, groups], so that a step along a group is one vector operation over all groups. Letters: x values, w weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.int32]

TINY = np.float32(1e-15)
"""Groups whose values are all smaller are groups of zeros."""
TRIES = 5
"""Rounds in which single codes are moved."""
MAGIC = np.float32(12582912.0)
"""1.5 * 2^23: adding it leaves the nearest whole number in the low bits of a float32."""


def total(x: Floats) -> Floats:
    """The sum down each group, in order: [values, groups] -> [groups]."""
    if x.shape[1] == 1:  # a single column would be summed pairwise
        return total(np.repeat(x, 2, axis=1))[:1]
    result: Floats = np.add.reduce(np.ascontiguousarray(x), axis=0)
    return result


def nearest(x: Floats) -> Codes:
    """The nearest whole number, ties to even; beyond 2^22, the low bits that llama.cpp gets."""
    return ((x + MAGIC).view(np.int32) & 0x7FFFFF) - 0x400000


def over(value: float | np.float32, x: Floats) -> Floats:
    """value / x in float32."""
    result: Floats = np.divide(np.float32(value), x)
    return result


def ratio(above: Floats, below: Floats) -> Floats:
    """above / below; 0 where below is not positive."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def largest(x: Floats) -> Floats:
    """The first value of largest magnitude in each group, with its sign; zeros have none."""
    result: Floats = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0] + np.float32(0)
    return result


def smallest(x: Floats) -> Floats:
    """The first of the smallest values in each group (which of 0 and -0 it is shows in the file)."""
    result: Floats = np.take_along_axis(x, x.argmin(0)[None], 0)[0]
    return result


def symmetric(x: Floats, levels: int, w: Floats) -> tuple[Floats, Codes]:
    """Signed codes without offset: x ~ scale * (code - levels), codes in 0..2 levels - 1.

    Returns:
        Scales [groups], of either sign; codes, which are 0 in groups of zeros.
    """
    top = largest(x)
    zeros = np.abs(top) < TINY
    top = np.where(zeros, np.float32(1), top)
    wx = w * x

    def fit(inverse: Floats) -> tuple[Floats, Floats]:
        codes = np.clip(np.rint(inverse * x), -levels, levels - 1)
        return total(wx * codes), total(w * codes * codes)

    chosen = over(-levels, top)
    sum_lx, sum_l2 = fit(chosen)
    scale = np.divide(sum_lx, sum_l2, out=np.zeros_like(sum_lx), where=sum_l2 != 0)
    best = scale * sum_lx
    for step in range(-9, 10):
        if step == 0:
            continue
        inverse = over(-(np.float32(levels) + np.float32(0.1) * np.float32(step)), top)
        sum_lx, sum_l2 = fit(inverse)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        chosen = np.where(better, inverse, chosen)
        scale = np.where(better, ratio(sum_lx, sum_l2), scale)
        best = np.where(better, scale * sum_lx, best)
    codes = np.clip(np.rint(chosen * x), -levels, levels - 1).astype(np.int32) + levels
    return np.where(zeros, np.float32(0), scale), np.where(zeros, 0, codes)


def offset(x: Floats, levels: int, w: Floats, first: float, step: float, steps: int) -> tuple[Floats, Floats, Codes]:
    """Unsigned codes with an offset that is not positive: x ~ scale * code - offset, codes in 0..levels.

    Args:
        first, step, steps: tries take `levels + first + step * i` steps over the range, i = 0..steps.

    Returns:
        Scales [groups], offsets [groups] (their sign turned), codes.
    """
    low, high = smallest(x), x.max(0)
    low = np.where(low > 0, np.float32(0), low)
    flat = high <= low
    high = np.where(flat, low + 1, high)
    sum_w, sum_x = total(w), total(w * x)

    def codes_of(inverse: Floats) -> Floats:
        codes: Floats = np.clip(np.rint(inverse * (x - low)), np.float32(0), np.float32(levels))
        return codes

    def error_of(scale: Floats, base: Floats, codes: Floats) -> Floats:
        difference = scale * codes + base - x
        return total(w * (difference * difference))

    inverse = over(levels, high - low)
    scale, codes = over(1, inverse), codes_of(inverse)
    best = error_of(scale, low, codes)
    flat_low = low.copy()
    for i in range(steps + 1):
        count = np.float32(first) + np.float32(step) * np.float32(i) + np.float32(levels)
        tried = codes_of(count / (high - low))
        wl = w * tried
        sum_l, sum_l2, sum_xl = total(wl), total(wl * tried), total(wl * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale, new_low = _line(sum_w, sum_x, sum_l, sum_l2, sum_xl, determinant)
        error = error_of(new_scale, new_low, tried)
        better = (determinant > 0) & (error < best)
        codes, best = np.where(better, tried, codes), np.where(better, error, best)
        scale, low = np.where(better, new_scale, scale), np.where(better, new_low, low)
    return (
        np.where(flat, np.float32(0), scale),
        -np.where(flat, flat_low, low),
        np.where(flat, 0, codes.astype(np.int32)),
    )


def _line(
    sum_w: Floats, sum_x: Floats, sum_l: Floats, sum_l2: Floats, sum_xl: Floats, determinant: Floats
) -> tuple[Floats, Floats]:
    """The least-squares line through the codes; with a positive offset, the one through the origin instead."""
    scale = ratio(sum_w * sum_xl - sum_x * sum_l, determinant)
    low = ratio(sum_l2 * sum_x - sum_l * sum_xl, determinant)
    above = low > 0
    return np.where(above, ratio(sum_xl, sum_l2), scale), np.where(above, np.float32(0), low)


def positive(x: Floats, levels: int, w: Floats) -> tuple[Floats, Codes]:
    """Unsigned codes of values that should not be negative (scales of scales): x ~ scale * code, codes in 0..levels, kept in 8 bits.

    Returns:
        Scales [groups], codes.
    """
    high = np.maximum(x.max(0), np.float32(0))
    zeros = high < TINY
    high = np.where(zeros, np.float32(1), high)

    def error_of(inverse: Floats, codes: Codes) -> Floats:
        difference = x - over(1, inverse) * codes.astype(np.float32)
        return total(w * difference * difference)

    chosen = over(levels, high)
    best = error_of(chosen, nearest(chosen * x) & 255)
    for step in range(-4, 5):
        if step == 0:
            continue
        inverse = over(np.float32(0.1) * np.float32(step) + np.float32(levels), high)
        error = error_of(inverse, np.minimum(levels, nearest(inverse * x)))
        better = error < best
        chosen, best = np.where(better, inverse, chosen), np.where(better, error, best)
    codes = np.minimum(levels, nearest(chosen * x))
    scale, codes = _moved(x, w, codes, lambda c: np.minimum(levels, c), 255)
    return np.where(zeros, np.float32(0), scale), np.where(zeros, 0, codes)


def greedy(x: Floats, levels: int) -> tuple[Floats, Codes]:
    """As `symmetric` with weights x^2, but by moving single codes instead of trying scales.

    Returns:
        Scales [groups], codes in 0..2 levels - 1.
    """
    top = largest(x)
    zeros = np.abs(top) < TINY
    inverse = over(-levels, np.where(zeros, np.float32(1), top))
    codes = np.clip(nearest(inverse * x), -levels, levels - 1)
    scale, codes = _moved(x, x * x, codes, lambda c: np.clip(c, -levels, levels - 1), None)
    return np.where(zeros, np.float32(0), scale), np.where(zeros, 0, codes + levels)


def _moved(x: Floats, w: Floats, codes: Codes, bound: Callable[[Codes], Codes], mask: int | None) -> tuple[Floats, Codes]:
    """Move one code after the other to where the least-squares scale of the others wants it, as long as the fit gets better.

    `mask`: codes are kept in 8 bits without sign, and sums that run empty forbid a move before it is tried.
    """
    wx, wide = w * x, codes.astype(np.float32)
    sum_lx, sum_l2 = total(wx * wide), total(w * wide * wide)
    codes = codes if mask is None else codes & mask
    for _ in range(TRIES):
        changed = False
        for i in range(len(x)):
            old = codes[i].astype(np.float32)
            lx, l2 = sum_lx - wx[i] * old, sum_l2 - w[i] * old * old
            allowed = (lx > 0) & (l2 > 0) if mask is not None else lx > 0
            new = bound(nearest(x[i] * l2 / np.where(allowed, lx, np.float32(1))))
            fresh = new.astype(np.float32)
            lx, l2 = lx + wx[i] * fresh, l2 + w[i] * fresh * fresh
            better = allowed & (new != codes[i]) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            if mask is None:
                better &= l2 > 0
            codes[i] = np.where(better, new if mask is None else new & mask, codes[i])
            sum_lx, sum_l2 = np.where(better, lx, sum_lx), np.where(better, l2, sum_l2)
            changed |= bool(better.any())
        if not changed:
            break
    return ratio(sum_lx, sum_l2), codes
