"""Codes into bytes and back: two nibbles a byte, four bytes a word, lowest first. Pure functions of tensors.

The two halves of each conversion stand side by side. All of them work tile by tile, in place of the output: no temporary is larger than a tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwench.numerics.chunks import Tile, Workspace, work_through

WORD_BITS = 32
FOUR = torch.tensor(4, dtype=torch.int16)
NIBBLES = torch.tensor(0x0F0F, dtype=torch.int16)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [rows, columns] of codes 0..15, an even number of columns, to uint8 [rows, columns / 2], even columns in the low nibbles."""
    packed = torch.empty(codes.shape[0], codes.shape[1] // 2, dtype=torch.uint8)

    def work(tile: Tile, space: Workspace) -> None:
        pairs = codes[tile.rows].view(torch.int16)
        high = torch.bitwise_right_shift(pairs, FOUR, out=space.take("high", tuple(pairs.shape), torch.int16))
        packed[tile.rows].copy_(high.bitwise_or_(pairs))  # keeps the low byte: odd << 4 | even

    work_through(codes, work)
    return packed


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [rows, n] to uint8 [rows, 2n] of codes 0..15."""
    codes = torch.empty(packed.shape[0], packed.shape[1] * 2, dtype=torch.uint8)

    def work(tile: Tile, space: Workspace) -> None:
        pairs = codes[tile.rows].view(torch.int16).copy_(packed[tile.rows])
        high = torch.bitwise_left_shift(pairs, FOUR, out=space.take("high", tuple(pairs.shape), torch.int16))
        pairs.bitwise_or_(high).bitwise_and_(NIBBLES)

    work_through(packed, work)
    return codes


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Signed integer codes into 32-bit words along the columns.

    int8 [rows, columns] to int32 [rows, ceil(columns * bits / 32)]; codes are stored with 2^(bits-1) added, the lowest column in the lowest
    bits; what is left of the last word is 0.
    """
    rows, columns = codes.shape
    words = math.ceil(columns * bits / WORD_BITS)
    offset = 2 ** (bits - 1)
    unsigned = torch.zeros(rows, words * WORD_BITS // bits, dtype=torch.uint8)
    torch.add(codes.view(torch.uint8), offset, out=unsigned[:, :columns])  # wraps round: -8 is 0, 7 is 15
    return (pack_nibbles(unsigned) if bits == 4 else unsigned).view(torch.int32)


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Contiguous int32 [rows, words] to signed codes, int8 [rows, columns]."""
    raw = words.view(torch.uint8)
    unsigned = (unpack_nibbles(raw) if bits == 4 else raw.clone())[:, :columns].contiguous()
    return unsigned.sub_(2 ** (bits - 1)).view(torch.int8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Like `pack_words`, but along the rows: int8 [rows, columns] to int32 [ceil(rows * bits / 32), columns]."""
    return _turned(pack_words(_turned(codes), bits))


def unpack_rows(words: Tensor, bits: int, rows: int) -> Tensor:
    """int32 [words, columns] to signed codes, int8 [rows, columns]."""
    return _turned(unpack_words(_turned(words), bits, rows))


def _turned(matrix: Tensor) -> Tensor:
    """The transpose, laid out anew. (`contiguous` would leave the strides of a single row as they are, and they could not be viewed as bytes.)"""
    return matrix.t().clone(memory_format=torch.contiguous_format)
