"""Reading weights through the map: by slot, by block in the form that the transformers classes want, and a few rows of a large matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.checkpoint.source import TensorSource
from qwench.models.map import Block, Slot

FUSED = {
    "gate": ("mlp.experts.gate_up_proj", 0, 2),
    "up": ("mlp.experts.gate_up_proj", 1, 2),
    "down": ("mlp.experts.down_proj", 0, 1),
}
"""Where an expert's matrix lies in the 3-D parameters of the transformers classes: the parameter, which part of its rows, of how many."""


def read_slot(source: TensorSource, slot: Slot, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """One logical weight, of the slot's shape; None: on the processor. Raises CheckpointError."""
    return source.read(slot.tensor, slot.part).to(device, dtype)


def read_block(
    source: TensorSource, block: Block, stem: str, dtype: torch.dtype, device: torch.device | None = None
) -> dict[str, Tensor]:
    """A decoder layer's weights by the parameter names of the transformers class, experts fused.

    Args:
        stem: what the layer's tensors' names begin with: `model.layers.3.`.
        device: where they go, one after the other; None: the processor.

    Raises:
        CheckpointError: from the source.
    """
    weights: dict[str, Tensor] = {}
    experts = 1 + max((s.expert for s in block.slots if s.expert is not None), default=-1)
    for slot in block.slots:
        if slot.expert is None:
            weights[slot.tensor.removeprefix(stem)] = read_slot(source, slot, dtype, device)
            continue
        name, part, parts = FUSED[slot.role.rpartition(".")[2]]
        rows, columns = slot.shape
        if name not in weights:
            weights[name] = torch.empty(experts, parts * rows, columns, dtype=dtype, device=device)
        weights[name][slot.expert, part * rows : (part + 1) * rows] = read_slot(source, slot, dtype, device)
    return weights


NEAR = 4
"""Rows between two wanted ones that are cheaper to read along than to skip."""


def read_rows(source: TensorSource, slot: Slot, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows of a matrix, in the order asked for, reading (nearly) only those.

    Args:
        rows: int64, any shape, repetitions allowed.

    Returns:
        [*rows.shape, columns].

    Raises:
        CheckpointError: from the source.
    """
    assert not slot.part, "rows of a whole tensor"
    wanted, place = torch.unique(rows, return_inverse=True)
    gathered = torch.empty(len(wanted), slot.shape[1], dtype=dtype)
    ends = (wanted.diff() > NEAR).nonzero().flatten().add(1).tolist()
    for first, last in zip([0, *ends], [*ends, len(wanted)], strict=True):
        run = wanted[first:last]
        if len(run):
            low, high = int(run[0]), int(run[-1]) + 1
            gathered[first:last] = source.read(slot.tensor, (slice(low, high),))[run - low].to(dtype)
    return gathered[place]
