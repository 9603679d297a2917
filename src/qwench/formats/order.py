"""Activation order in files: a tensor that says for every column which group it is of (`g_idx`, `weight_g_idx`).

GPTQ with dynamic order (desc_act) forms its groups along the order in which columns are rounded, so that a column's group does not follow from its
place. Without order the tensor is absent, or says column // group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.errors import CheckpointError
from qwench.numerics import Quantized, Scheme

MEND = "the file does not hold what its config.json says: fetch it again, or ask who made it"


def column_groups(quantized: Quantized) -> Tensor:
    """The group of each column, int32 [in], also where nothing is ordered."""
    if quantized.group_of_column is not None:
        return quantized.group_of_column.to(torch.int32)
    return in_place(quantized.codes.shape[1], quantized.scales.shape[1])


def in_place(columns: int, groups: int) -> Tensor:
    """The group of each column where nothing is ordered, int32 [columns]."""
    return torch.arange(columns, dtype=torch.int32) // (columns // groups)


def order_of(name: str, g_idx: Tensor | None, scheme: Scheme, columns: int, groups: int) -> Tensor | None:
    """What `Quantized.group_of_column` is after reading `g_idx`: None where it says what would be so without it.

    Args:
        name: of the tensor, for errors.
        g_idx: int32 [columns], or None where the file has none.

    Raises:
        CheckpointError: it names groups that are not there, or it orders columns and the scheme does not.
    """
    if g_idx is None:
        return None
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise CheckpointError(f"{name} names groups from {low} to {high}, there are {groups}", MEND)
    if torch.equal(g_idx, in_place(columns, groups)):
        return None
    if not scheme.ordered:
        raise CheckpointError(f"{name} orders the columns, config.json says that they are not ordered", MEND)
    return g_idx
