"""GGUF's types with blocks of 32 values and one float16 scale (and offset) each, and those with a table of levels that lie closer around zero.

| type   | bits | a value is                       |
|--------|------|----------------------------------|
| Q8_0   | 8.5  | d * code, -127..127              |
| Q5_0   | 5.5  | d * (code - 16)                  |
| Q4_0   | 4.5  | d * (code - 8)                   |
| Q5_1   | 6    | d * code + m                     |
| Q4_1   | 5    | d * code + m                     |
| IQ4_NL | 4.5  | d * LEVELS[code]                 |
| IQ4_XS | 4.25 | d * (scale - 32) * LEVELS[code]  | blocks of 256 in groups of 32

Layouts and algorithms are ggml's; bytes equal those of llama.cpp. An encoder takes x float32 [rows, columns] and importance float32 of the same shape or None, and gives
uint8 [blocks, bytes of a block]. (Whole rows: with importance, the weights of four of the types depend on a row's mean square.)
"""

from __future__ import annotations

import numpy as np

from qwench.numerics.ggml_search import TINY, Codes, Floats, largest, nearest, offset, over, smallest, symmetric, total
from qwench.numerics.k_quants import Bytes, by_block, groups_of, half_bytes

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
"""What the codes of IQ4_NL and IQ4_XS stand for."""
BETWEEN = (LEVELS[1:] + LEVELS[:-1]) / 2
NEAREST = np.searchsorted(BETWEEN, np.arange(-256, 257) / 2, side="right").astype(np.int32)
"""The nearest level of n / 2, n = -256..256. All borders are multiples of a half, so that the floor of 2x decides."""
TRIES = 7


def _inverse(d: Floats) -> Floats:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def _nibbles(codes: Codes) -> Bytes:
    """[32, blocks] -> [blocks, 16]: the first half of a block in the low nibbles."""
    low = codes.astype(np.uint8) & 15
    result: Bytes = np.bitwise_or(low[:16], low[16:] << 4).T
    return result


def _fifth_bits(codes: Codes) -> Bytes:
    """[32, blocks] -> [blocks, 4]: bit 4 of each code, one after the other."""
    return np.packbits((codes >> 4 & 1).astype(np.uint8).T, axis=1, bitorder="little")


def _row_weights(x: Floats, importance: Floats) -> Floats:
    """importance * sqrt(mean square of the row + x^2), in groups of 32."""
    wide = np.ascontiguousarray(x.T)
    mean = total(wide * wide) / np.float32(x.shape[1])
    return groups_of((importance * np.sqrt(mean[:, None] + x * x)).astype(np.float32), 32)


def encode_q8_0(x: Floats, importance: Floats | None) -> Bytes:
    """Importance makes no difference: the largest value decides."""
    values = groups_of(x, 32)
    d = np.abs(values).max(0) / np.float32(127)
    scaled = values * _inverse(d)
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    # 0.5 - 2^-25 plus 0.5 would round up to 1
    codes = np.where(np.abs(scaled) < 0.5, np.float32(0), codes).astype(np.int8)
    return np.concatenate([half_bytes(d), np.ascontiguousarray(codes.T).view(np.uint8)], axis=1)


def _symmetric_codes(x: Floats, importance: Floats | None, levels: int) -> tuple[Floats, Codes]:
    values = groups_of(x, 32)
    if importance is not None:
        return symmetric(values, levels, _row_weights(x, importance))
    d = largest(values) / np.float32(-levels)
    shifted = values * _inverse(d) + np.float32(levels + 0.5)
    return d, np.minimum(2 * levels - 1, shifted.astype(np.int32))


def encode_q4_0(x: Floats, importance: Floats | None) -> Bytes:
    d, codes = _symmetric_codes(x, importance, 8)
    return np.concatenate([half_bytes(d), _nibbles(codes)], axis=1)


def encode_q5_0(x: Floats, importance: Floats | None) -> Bytes:
    d, codes = _symmetric_codes(x, importance, 16)
    return np.concatenate([half_bytes(d), _fifth_bits(codes), _nibbles(codes)], axis=1)


def _offset_codes(x: Floats, importance: Floats | None, levels: int) -> tuple[Floats, Floats, Codes]:
    values = groups_of(x, 32)
    if importance is not None:
        d, low, codes = offset(values, levels, _row_weights(x, importance), -0.9, 0.05, 36)
        return d, -low, codes
    low = smallest(values)
    d = (values.max(0) - low) / np.float32(levels)
    return d, low, np.minimum(levels, ((values - low) * _inverse(d) + np.float32(0.5)).astype(np.int32))


def encode_q4_1(x: Floats, importance: Floats | None) -> Bytes:
    d, low, codes = _offset_codes(x, importance, 15)
    return np.concatenate([half_bytes(d), half_bytes(low), _nibbles(codes)], axis=1)


def encode_q5_1(x: Floats, importance: Floats | None) -> Bytes:
    d, low, codes = _offset_codes(x, importance, 31)
    return np.concatenate([half_bytes(d), half_bytes(low), _fifth_bits(codes), _nibbles(codes)], axis=1)


def nearest_level(x: Floats) -> Codes:
    """The code of the nearest level, the upper one of two that are as near."""
    result: Codes = NEAREST[np.clip(np.floor(x * np.float32(2)), -256, 256).astype(np.int32) + 256]
    return result


def _level_scales(values: Floats, weights: Floats) -> Floats:
    """The scale of each group by least squares over 16 tries; 0 in groups of zeros."""
    top = largest(values)
    zeros = np.abs(top) < TINY
    top = np.where(zeros, np.float32(1), top)

    def fit(inverse: Floats) -> tuple[Floats, Floats]:
        levels = LEVELS[nearest_level(inverse * values)]
        wq = weights * levels
        return total(wq * values), total(wq * levels)

    sum_qx, sum_q2 = fit(over(1, -top / LEVELS[0]))
    scale = np.divide(sum_qx, sum_q2, out=np.zeros_like(sum_qx), where=sum_q2 > 0)
    best = scale * sum_qx
    for step in range(-TRIES, TRIES + 1):
        sum_qx, sum_q2 = fit(over(np.float32(step) + LEVELS[0], top))
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = np.where(better, np.divide(sum_qx, sum_q2, out=np.zeros_like(sum_qx), where=sum_q2 > 0), scale)
        best = np.where(better, scale * sum_qx, best)
    return np.where(zeros, np.float32(0), scale)


def _level_weights(x: Floats, importance: Floats | None, block: int) -> Floats:
    """x^2, or importance * sqrt(twice the mean square of the block + x^2), in groups of 32."""
    values = x.reshape(-1, block)
    if importance is None:
        return groups_of(values * values, 32)
    wide = np.ascontiguousarray(values.T)
    mean = total(wide * wide) * (np.float32(2) / np.float32(block))
    return groups_of((importance.reshape(-1, block) * np.sqrt(mean[:, None] + values * values)).astype(np.float32), 32)


def encode_iq4_nl(x: Floats, importance: Floats | None) -> Bytes:
    values = groups_of(x, 32)
    d = _level_scales(values, _level_weights(x, importance, 32))
    return np.concatenate([half_bytes(d), _nibbles(nearest_level(_inverse(d) * values))], axis=1)


def encode_iq4_xs(x: Floats, importance: Floats | None) -> Bytes:
    values = groups_of(x, 32)
    blocks = values.size // 256
    scales = by_block(_level_scales(values, _level_weights(x, importance, 256)), blocks).astype(np.float32)  # [8, blocks]
    d = -largest(scales) / np.float32(32)
    coded = np.clip(nearest(_inverse(d) * scales), -32, 31)
    step = (d * coded.astype(np.float32)).T.reshape(-1)
    codes = nearest_level(_inverse(step) * values)
    stored = coded + 32
    high = np.bitwise_or.reduce(stored >> 4 << (2 * np.arange(8))[:, None], axis=0).astype(np.uint16)
    low = ((stored[0::2] & 15) | (stored[1::2] & 15) << 4).astype(np.uint8).T
    parts = [half_bytes(d), high.view(np.uint8).reshape(-1, 2), low, _nibbles(codes).reshape(blocks, 128)]
    return np.concatenate(parts, axis=1)
