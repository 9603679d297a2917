"""K-quants: blocks of 256 values in groups of 16 or 32, whose scales are themselves quantized against one or two float16 numbers for the block.

| type | bits | a value is                                   | group | scales        |
|------|------|----------------------------------------------|-------|---------------|
| Q3_K | 3.44 | d * (scale - 32) * (code - 4)                | 16    | 6 bits        |
| Q4_K | 4.5  | d * scale * code - dmin * offset             | 32    | 6 bits, twice |
| Q5_K | 5.5  | d * scale * code - dmin * offset             | 32    | 6 bits, twice |
| Q6_K | 6.56 | d * scale * (code - 32)                      | 16    | 8 bits        |

Layouts and algorithms are ggml's (ggml/src/ggml-common.h, ggml-quants.c); bytes equal those of llama.cpp, with and without importance.

An encoder takes x float32 [blocks, 256] and importance float32 of the same shape or None, and gives uint8 [blocks, bytes of a block].
Inside, [values, groups] with groups in the order of the blocks: see ggml_search.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwench.numerics.ggml_search import TINY, Codes, Floats, greedy, largest, nearest, offset, over, positive, symmetric, total

BLOCK = 256
Bytes = NDArray[np.uint8]


def groups_of(x: Floats, size: int) -> Floats:
    """[blocks, 256] -> [size, blocks * 256 / size]."""
    return np.ascontiguousarray(x.reshape(-1, size).T)


def by_block(per_group: NDArray[np.generic], blocks: int) -> NDArray[np.generic]:
    """[groups of all blocks] -> [groups of a block, blocks]."""
    return np.ascontiguousarray(per_group.reshape(blocks, -1).T)


def half(x: Floats) -> Floats:
    """Rounded to float16, as float32 again."""
    return x.astype(np.float16).astype(np.float32)


def half_bytes(x: Floats) -> Bytes:
    """[blocks] -> [blocks, 2]."""
    return np.ascontiguousarray(x.astype(np.float16)).view(np.uint8).reshape(-1, 2)


def spread(x: Floats, importance: Floats, size: int) -> Floats:
    """Weights where there is an importance: importance * sqrt(2 * mean square of the block + x^2), in groups."""
    wide = np.ascontiguousarray(x.T)
    mean = np.float32(2) * total(wide * wide) / np.float32(BLOCK)
    return groups_of((importance * np.sqrt(mean[:, None] + x * x)).astype(np.float32), size)


def recoded(x: Floats, scale: Floats, base: Floats | None, low: int, high: int, found: Codes) -> Codes:
    """Codes for the scales as they are stored, [values, groups]; groups whose scale became 0 keep what the search found."""
    usable = scale != 0
    divisor: Floats = np.where(usable, scale, np.float32(1))
    codes = nearest((x if base is None else x + base) / divisor)
    return np.where(usable, np.clip(codes, low, high) - low, found)


def encode_q6_k(x: Floats, importance: Floats | None) -> Bytes:
    blocks = len(x)
    values = groups_of(x, 16)
    weights = values * values if importance is None else groups_of(importance, 16)
    scales, found = symmetric(values, 32, weights)
    per_block = by_block(scales, blocks).astype(np.float32)
    top = largest(per_block)
    empty = np.abs(top) < TINY
    inverse = over(-128, np.where(empty, np.float32(1), top))
    d = np.where(empty, np.float32(0), half(over(1, inverse)))
    coded = np.where(empty, 0, np.minimum(127, nearest(inverse * per_block)))  # [16, blocks]
    steps = (d * coded.astype(np.float32)).T.reshape(-1)
    codes = recoded(values, steps, None, -32, 31, found)
    codes = np.where(np.repeat(empty, 16), 0, codes)
    flat = codes.T.reshape(blocks, 2, 4, 32).astype(np.uint8)
    low, high = flat & 15, flat >> 4
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = [ql.reshape(blocks, 128), qh.reshape(blocks, 64), coded.T.astype(np.int8).view(np.uint8), half_bytes(d)]
    return np.concatenate(parts, axis=1)


def encode_q4_k(x: Floats, importance: Floats | None) -> Bytes:
    head, codes = _with_offsets(x, importance, 15, (-1.0, 0.1, 20))
    flat = codes.T.reshape(len(x), 4, 2, 32).astype(np.uint8)
    return np.concatenate([head, (flat[:, :, 0] | flat[:, :, 1] << 4).reshape(len(x), 128)], axis=1)


def encode_q5_k(x: Floats, importance: Floats | None) -> Bytes:
    head, codes = _with_offsets(x, importance, 31, (-0.5, 0.1, 15))
    flat = codes.T.reshape(len(x), 4, 2, 32).astype(np.uint8)
    low, high = flat & 15, (flat >> 4).reshape(len(x), 8, 32)
    qh = np.bitwise_or.reduce(high << np.arange(8, dtype=np.uint8)[None, :, None], axis=1)
    return np.concatenate([head, qh, (low[:, :, 0] | low[:, :, 1] << 4).reshape(len(x), 128)], axis=1)


def _with_offsets(x: Floats, importance: Floats | None, levels: int, tries: tuple[float, float, int]) -> tuple[Bytes, Codes]:
    """The first 16 bytes of a block of Q4_K or Q5_K, and its codes [32, groups]. `tries` are those without importance."""
    blocks, values = len(x), groups_of(x, 32)
    if importance is None:
        mean = np.sqrt(total(values * values) / np.float32(32))
        scales, offsets, found = offset(values, levels, mean + np.abs(values), *tries)
        d, scale_codes = _against_largest(by_block(scales, blocks).astype(np.float32))
        dmin, offset_codes = _against_largest(by_block(offsets, blocks).astype(np.float32))
    else:
        weights = spread(x, importance, 32)
        scales, offsets, found = offset(values, levels, weights, -0.9, 0.05, 36)
        sums = by_block(total(weights), blocks).astype(np.float32)
        d, scale_codes = positive(by_block(scales, blocks).astype(np.float32), 63, sums)
        dmin, offset_codes = positive(by_block(offsets, blocks).astype(np.float32), 63, sums)
        if levels == 31:
            scale_codes, offset_codes = np.minimum(63, scale_codes), np.minimum(63, offset_codes)
    packed = _pack_6_bits(scale_codes, offset_codes)
    stored_scales, stored_offsets = _unpack_6_bits(packed)
    step = (half(d) * stored_scales.astype(np.float32)).T.reshape(-1)
    base = (half(dmin) * stored_offsets.astype(np.float32)).T.reshape(-1)
    codes = recoded(values, step, base, 0, levels, found)
    return np.concatenate([half_bytes(d), half_bytes(dmin), packed.T], axis=1), codes


def _against_largest(per_block: Floats) -> tuple[Floats, Codes]:
    """Six bits for each of 8 scales against the largest of them: the step [blocks] and codes [8, blocks]."""
    top = np.maximum(per_block.max(0), np.float32(0))
    inverse = np.divide(np.float32(63), top, out=np.zeros_like(top), where=top > 0)
    return top / np.float32(63), np.minimum(63, nearest(inverse * per_block) & 255)


def _pack_6_bits(scales: Codes, offsets: Codes) -> Bytes:
    """8 scales and 8 offsets of 6 bits each in 12 bytes: [8, blocks] twice -> [12, blocks].

    Bytes 0..3 hold scales 0..3 and bytes 4..7 offsets 0..3 in their low six bits; bytes 8..11 the low nibbles of scales and offsets 4..7, whose two high bits
    are on top of bytes 0..7.
    """
    packed = np.concatenate([scales[:4], offsets[:4], (scales[4:] & 15) | (offsets[4:] & 15) << 4])
    packed[:4] |= scales[4:] >> 4 << 6
    packed[4:8] |= offsets[4:] >> 4 << 6
    return packed.astype(np.uint8)


def _unpack_6_bits(packed: Bytes) -> tuple[Codes, Codes]:
    wide = packed.astype(np.int32)
    scales = np.concatenate([wide[:4] & 63, (wide[8:] & 15) | wide[:4] >> 6 << 4])
    offsets = np.concatenate([wide[4:8] & 63, wide[8:] >> 4 | wide[4:8] >> 6 << 4])
    return scales, offsets


def encode_q3_k(x: Floats, importance: Floats | None) -> Bytes:
    blocks, values = len(x), groups_of(x, 16)
    if importance is None:
        scales, found = greedy(values, 4)
        d, coded = _signed_against_largest(by_block(scales, blocks).astype(np.float32))
    else:
        weights = spread(x, importance, 16)
        scales, found = symmetric(values, 4, weights)
        sums = by_block(total(weights), blocks).astype(np.float32)
        d, coded = symmetric(by_block(scales, blocks).astype(np.float32), 32, sums)
    steps = (half(d) * (coded - 32).astype(np.float32)).T.reshape(-1)
    codes = recoded(values, steps, None, -4, 3, found).T.reshape(blocks, BLOCK).astype(np.uint8)
    high = (codes > 3).astype(np.uint8).reshape(blocks, 8, 32) << np.arange(8, dtype=np.uint8)[None, :, None]
    low = (codes & 3).reshape(blocks, 2, 4, 32) << np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    parts = [np.bitwise_or.reduce(high, axis=1), np.bitwise_or.reduce(low, axis=2).reshape(blocks, 64), _pack_q3(coded).T]
    return np.concatenate([*parts, half_bytes(d)], axis=1)


def _signed_against_largest(per_block: Floats) -> tuple[Floats, Codes]:
    """Six signed bits for each of 16 scales against the one of largest magnitude: the step [blocks] and codes 0..63 [16, blocks]."""
    top = largest(per_block)
    empty = top == 0
    inverse = over(-32, np.where(empty, np.float32(1), top))
    codes = np.clip(nearest(inverse * per_block), -32, 31) + 32
    return np.where(empty, np.float32(0), over(1, inverse)), np.where(empty, 0, codes)


def _pack_q3(codes: Codes) -> Bytes:
    """16 codes of 6 bits in 12 bytes: [16, blocks] -> [12, blocks]; low nibbles in bytes 0..7, high pairs in bytes 8..11."""
    low = (codes[:8] & 15) | (codes[8:] & 15) << 4
    high = codes.reshape(4, 4, -1) >> 4 << np.array([0, 2, 4, 6])[:, None, None]
    return np.concatenate([low, np.bitwise_or.reduce(high, axis=0)]).astype(np.uint8)
