"""One decoder layer in memory, which a walk runs, observes and changes.

    live = LiveBlock(source, map, modules, 3)
    live.run(hidden)                               # as transformers would
    live.weight(slot).mul_(scale)                  # changes what the next run sees
    live.store(slot, quantized)                    # what a file will hold; the next run sees its values

Weights are in the numbers that the layer computes in, on the device that it runs on (see `models.place`), experts fused as in the transformers classes;
`weight` shows any slot of it as a view. What is read from files or goes into them is in main memory. The MTP head is a live block too (see `head`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qwench.checkpoint.source import TensorSource
from qwench.models.inputs import rounding_inputs
from qwench.models.kernels import kernels_for
from qwench.models.map import Block, ModelMap, Slot
from qwench.models.modules import Modules, text_positions
from qwench.models.place import CPU, Place
from qwench.models.weights import FUSED, read_block
from qwench.numerics import InputRounding, Quantized
from qwench.stream.middle import Middle, SecondHalf, in_first_half, seeing_middle, watched


@dataclass(frozen=True)
class Batch:
    """What a layer reads of some rows.

    Attributes:
        hidden: their hidden states [B, T, D].
        positions: where their tokens stand, int64 [3, B, T]; None: 0, 1, 2 ... as in text.
        rows: their numbers in the walk, int64 [B], where they are the rows that go onward; None: others.
    """

    hidden: Tensor
    positions: Tensor | None = None
    rows: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.hidden.shape

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """The same elsewhere."""
        return Batch(self.hidden.to(device, dtype), self.positions, self.rows)


class LiveBlock:
    """A decoder layer of a checkpoint, changeable.

    Attributes:
        block: its slots and sets.
        weights: by parameter name of the transformers class, in `dtype` on `device`.
        quantized: what was stored for a module, by module.
        altered: slots whose weights were changed without being quantized, by module.
        rounded: how what a module reads is rounded from now on, by module.
        middle: where the rows that go onward are kept between the layer's halves (see `middle`); None: nowhere.
    """

    middle: Middle | None = None

    def __init__(self, source: TensorSource, map: ModelMap, modules: Modules, index: int, place: Place = CPU) -> None:
        block, stem = map.blocks[index], f"{map.prefix}layers.{index}."
        weights = read_block(source, block, stem, place.dtype, place.device)
        self._hold(block, stem, modules, modules.layer(block.kind), weights, place)

    def _hold(
        self, block: Block, stem: str, modules: Modules, layer: nn.Module, weights: dict[str, Tensor], place: Place
    ) -> None:
        self.block, self.stem, self.modules, self.layer = block, stem, modules, layer
        self.weights, self.dtype, self.device = weights, place.dtype, place.device
        self.quantized: dict[str, Quantized] = {}
        self.altered: dict[str, Slot] = {}
        self.rounded: dict[str, InputRounding] = {}

    @property
    def label(self) -> str:
        """The layer for a person: `layer 3`, `mtp layer 0`."""
        return self.block.label

    def parameter(self, slot: Slot) -> tuple[str, tuple[int | slice, ...]]:
        """Where a slot lies in `weights`: the parameter's name, and the part of it."""
        if slot.expert is None:
            return slot.tensor.removeprefix(self.stem), ()
        name, part, _ = FUSED[slot.role.rpartition(".")[2]]
        rows = slot.shape[0]
        return name, (slot.expert, slice(part * rows, (part + 1) * rows))

    def weight(self, slot: Slot) -> Tensor:
        """A slot's weight, a view of what runs."""
        name, part = self.parameter(slot)
        return self.weights[name][part] if part else self.weights[name]

    def alter(self, slot: Slot, value: Tensor) -> None:
        """Give a slot another weight that a file will hold as it is (a smoothed norm, a rescaled router)."""
        self._forget_middle(slot)
        self.weight(slot).copy_(value)
        self.altered[slot.module] = slot

    def store(self, slot: Slot, quantized: Quantized) -> None:
        """Give a slot its quantized form; what runs from now on are its values, the low-rank correction included."""
        self._forget_middle(slot)
        self.quantized[slot.module] = quantized
        self.altered.pop(slot.module, None)
        values = quantized.dequantize()
        if quantized.low_rank is not None:
            down, up = quantized.low_rank
            values += up.float() @ down.float()
        self.weight(slot).copy_(values)

    @torch.no_grad()
    def run(self, batch: Batch | Tensor) -> Tensor:
        """Hidden states [B, T, D] after the layer, for rows from anywhere; they stay on its device. A tensor is hidden states of text."""
        middle = self.middle
        if middle is None or isinstance(batch, Tensor) or batch.rows is None:
            return self.run_with(self.weights, batch)
        rows, known = batch.rows, None if watched(self.layer) else middle.pick(batch.rows)
        if known is not None:
            return self._from_middle(known)
        with seeing_middle(self.layer, lambda seen: middle.put(rows, seen)):
            return self.run_with(self.weights, batch)

    def run_with(self, weights: Mapping[str, Tensor], batch: Batch | Tensor) -> Tensor:
        """Hidden states after the layer with other weights by parameter name; gradients flow where the weights want them."""
        batch = batch if isinstance(batch, Batch) else Batch(batch)
        rows, length, _ = batch.shape
        hidden_BTD = batch.hidden.to(self.device, self.dtype)
        positions = text_positions(length).expand(3, rows, length) if batch.positions is None else batch.positions
        rope = self.modules.rope(positions, hidden_BTD)
        named: dict[str, Any] = {"position_embeddings": rope, "attention_mask": None}
        # Rounded inputs turn the last bit of a sum into a step of their grid: there every sum is added in the order in which readers add it.
        with (
            kernels_for(hidden_BTD, quick=not self.rounded),
            rounding_inputs(self.layer, self.block.slots, self.stem, self.rounded),
        ):
            result: Tensor = functional_call(self.layer, dict(weights), (hidden_BTD,), named, strict=True)
        return result

    def _from_middle(self, middle_BTD: Tensor) -> Tensor:
        """The second half of the layer alone."""
        middle_BTD = middle_BTD.to(self.device, self.dtype)
        weights = {f"layer.{name}": weight for name, weight in self.weights.items()}
        with (
            kernels_for(middle_BTD, quick=not self.rounded),
            rounding_inputs(self.layer, self.block.slots, self.stem, self.rounded),
        ):
            result: Tensor = functional_call(SecondHalf(self.layer), weights, (middle_BTD,), strict=True)
        return result

    def round_inputs(self, found: Mapping[str, InputRounding]) -> None:
        """From now on round what these modules read."""
        self.rounded |= found
        if any(in_first_half(slot) for slot in self.block.slots if slot.module in found) and self.middle is not None:
            self.middle.forget()

    def close(self) -> None:
        """Let go of what lies on the disk."""
        if self.middle is not None:
            self.middle.close()

    def _forget_middle(self, slot: Slot) -> None:
        if self.middle is not None and in_first_half(slot):
            self.middle.forget()

    def submodule(self, slot: Slot) -> nn.Module:
        """The transformers module that applies a slot's weight: for an expert, the module of all experts."""
        name, _ = self.parameter(slot)
        return self.layer.get_submodule(name.rpartition(".")[0])
