"""GPTQ's tensors written and read number by number, as its papers' code did: slow, literal, with Python's integers."""

from __future__ import annotations

import torch
from torch import Tensor


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def pack_down(unsigned: list[list[int]], bits: int) -> Tensor:
    """[rows][columns] of unsigned codes to int32 [rows * bits / 32, columns]: row 0 in the lowest bits of the first word."""
    per_word = 32 // bits
    words = [[0] * len(unsigned[0]) for _ in range(len(unsigned) // per_word)]
    for row, values in enumerate(unsigned):
        for column, value in enumerate(values):
            assert 0 <= value < 2**bits
            words[row // per_word][column] |= value << (bits * (row % per_word))
    return torch.tensor([[signed(word) for word in line] for line in words], dtype=torch.int32)


def pack_across(unsigned: list[list[int]], bits: int) -> Tensor:
    """[rows][columns] to int32 [rows, columns * bits / 32]."""
    turned = [list(column) for column in zip(*unsigned, strict=True)]
    return pack_down(turned, bits).t().contiguous()


def write(
    codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, group_of_column: list[int], bits: int, less: int
) -> dict[str, Tensor]:
    """codes and zero points are unsigned; `less`: what is taken off zero points before they are stored: 1 in version 1, 0 in version 2."""
    return {
        "qweight": pack_down(codes_OI.t().tolist(), bits),
        "qzeros": pack_across((zeros_OG.t() - less).tolist(), bits),
        "scales": scales_OG.t().contiguous(),
        "g_idx": torch.tensor(group_of_column, dtype=torch.int32),
    }


def read(tensors: dict[str, Tensor], bits: int, more: int, group: int) -> Tensor:
    """The values, float32 [out, in]; `more` is added to stored zero points; without `g_idx` column i is of group i // group."""
    words, rows = tensors["qweight"].shape
    per_word, mask = 32 // bits, 2**bits - 1
    columns = words * per_word
    qweight, qzeros, scales = tensors["qweight"].tolist(), tensors["qzeros"].tolist(), tensors["scales"].float().tolist()
    order = tensors["g_idx"].tolist() if "g_idx" in tensors else [i // group for i in range(columns)]
    values = torch.empty(rows, columns)
    for o in range(rows):
        for i in range(columns):
            code = (qweight[i // per_word][o] >> (bits * (i % per_word))) & mask
            zero = ((qzeros[order[i]][o // per_word] >> (bits * (o % per_word))) & mask) + more
            values[o, i] = torch.tensor(float(code - zero)) * torch.tensor(scales[order[i]][o])
    return values
