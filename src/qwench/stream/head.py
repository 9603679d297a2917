"""The MTP head as the last stop of a walk: its fc and its one decoder layer in memory, and what they read.

    x_t = fc([norm_e(embedding of token t+1) ; norm_h(h_t)])          h_t: the trunk's hidden state after its final norm

A change sees the head as a layer like any other, whose hidden states are twice as wide and one position shorter: its input is the pair in brackets, and
fc is the first of its modules. So what rounding does to fc reaches the layer behind it, as it will in the release. The pairs are never stored: they are made
of the trunk's hidden states and of the embedding's rows, a few rows of text at a time.

Letters in names: B rows, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qwench.checkpoint.source import TensorSource
from qwench.errors import CheckpointError
from qwench.models.map import Block, ModelMap, Slot
from qwench.models.modules import Modules, lend
from qwench.models.place import CPU, Place
from qwench.models.run import Trunk
from qwench.models.weights import read_block, read_slot
from qwench.stream.hidden import Hidden
from qwench.stream.live import LiveBlock
from qwench.stream.row_inputs import RowInputs

STEM = "mtp."


def head_block(source: TensorSource, map: ModelMap) -> Block:
    """The head as one block: its layer, with fc in front of it, which reads an input set of its own, `fc`.

    Raises:
        CheckpointError: the checkpoint has no head, or one of several layers.
    """
    if len(map.mtp) != 1:
        what = f"its MTP head has {len(map.mtp)} layers" if map.mtp else "it has no MTP head"
        raise CheckpointError(
            f"{source.folder}: {what}, one layer can be run", "take the mtp.* tensors of the original checkpoint"
        )
    layer, fc = map.mtp[0], map.other("mtp.fc")
    return replace(layer, slots=(fc, *layer.slots), inputs={"fc": (fc,), **layer.inputs})


class LiveHead(LiveBlock):
    """The head of a checkpoint, changeable. `run` takes the pairs [B, T, 2D] and answers hidden states before the head's own norm [B, T, D].

    Raises:
        CheckpointError: see `head_block`.
    """

    def __init__(self, source: TensorSource, map: ModelMap, modules: Modules, place: Place = CPU) -> None:
        block = head_block(source, map)
        stem, fc = f"{STEM}layers.{block.index}.", map.other("mtp.fc")
        weights = read_block(source, replace(block, slots=map.mtp[0].slots), stem, place.dtype, place.device)
        weights["fc.weight"] = read_slot(source, fc, place.dtype, place.device)
        self._hold(block, stem, modules, _with_fc(modules.new_layer(block.kind), fc), weights, place)

    def parameter(self, slot: Slot) -> tuple[str, tuple[int | slice, ...]]:
        name, part = super().parameter(slot)
        return name.removeprefix(STEM), part


def _with_fc(layer: nn.Module, fc: Slot) -> nn.Module:
    """A decoder layer that reads pairs: fc stands before it."""
    outputs, inputs = fc.shape
    layer.add_module("fc", nn.Linear(inputs, outputs, bias=False, device="meta"))
    layer.register_forward_pre_hook(lambda module, read: (module.get_submodule("fc")(read[0]), *read[1:]))
    return layer.eval()


def with_plain_roles(live: LiveBlock) -> LiveBlock:
    """The same layer in memory, with roles that say no `mtp.`: for a change that treats the head's layer as any other. What is done to it is done to the head."""
    if live.block.component != "mtp":
        return live
    block, plain = live.block, copy(live)
    named = {slot.module: replace(slot, role=slot.role.removeprefix(STEM)) for slot in block.slots}

    def sets(tagged: Mapping[str, tuple[Slot, ...]]) -> dict[str, tuple[Slot, ...]]:
        return {name: tuple(named[slot.module] for slot in slots) for name, slots in tagged.items()}

    folds = tuple(
        replace(f, source=f.source.removeprefix(STEM), readers=tuple(r.removeprefix(STEM) for r in f.readers))
        for f in block.folds
    )
    plain.block = replace(block, slots=tuple(named.values()), inputs=sets(block.inputs), fused=sets(block.fused), folds=folds)
    return plain


@dataclass(frozen=True)
class HeadStates:
    """The pairs that fc reads, [rows, length - 1, 2D], made as they are asked for.

    Attributes:
        hidden: the trunk's hidden states before its final norm.
        inputs: the rows before the first layer.
    """

    hidden: Hidden
    inputs: RowInputs

    @property
    def trunk(self) -> Trunk:
        """What norms."""
        return self.inputs.trunk

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, length, width = self.hidden.shape
        return rows, length - 1, 2 * width

    @property
    def dtype(self) -> torch.dtype:
        return self.trunk.dtype

    def read(self, first: int, last: int) -> Tensor:
        """The pairs of rows first..last-1."""
        return self.pick(torch.arange(first, last))

    @torch.no_grad()
    def pick(self, rows: Tensor) -> Tensor:
        """The pairs of some rows, in the order asked for."""
        hidden_BTD = self.trunk.norm(self.hidden.pick(rows)[:, :-1])
        embedded_BTD = self.inputs.embed(rows)[:, 1:]
        return torch.cat([self._norm("embedding", embedded_BTD), self._norm("hidden", hidden_BTD)], dim=-1)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = read_slot(self.trunk.source, self.trunk.map.other(f"mtp.norm.{name}"), self.trunk.dtype)
        return lend(self.trunk.modules.norm, {"weight": weight}, x)
