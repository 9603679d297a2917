"""A checkpoint without some of its experts, before anybody knows which.

    target = Pruned(source, map_of(source), 128)         # names, shapes and config of 128 experts a layer: enough for a plan
    target.settle("mtp layer 0", kept)                   # as a walk finds out, layer by layer
    target.read("mtp.layers.0.mlp.gate.weight")          # the kept rows, bit for bit

The experts that stay are numbered anew, 0 to K-1, in their old order: in fused tensors, in names, and in the router's rows. Engines read one number of experts for all layers, the MTP
head's included.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.source import Part, StoredSource, TensorEntry
from qwench.models.geometry import text_config
from qwench.models.map import Block, ModelMap
from qwench.models.tables import MTP

COUNT = "num_experts"


class Pruned:
    """A view of a mixture of experts with `count` experts in every layer; see `StoredSource`. What belongs to no routed expert is as in the source.

    Attributes:
        whole, whole_map: the checkpoint with all its experts.
        count, before: experts of each layer, and how many the source has.
        kept: by layer (see `Block.label`), the old numbers of those that stay, in order; reading a layer's experts needs them.
    """

    def __init__(self, whole: StoredSource, map: ModelMap, count: int) -> None:
        self.whole, self.whole_map, self.count, self.folder = whole, map, count, whole.folder
        self.before: int = text_config(whole.config)[COUNT]
        self.config, self.notes = config_with_experts(whole.config, count), whole.notes
        self.kept: dict[str, tuple[int, ...]] = {}
        self._stacked: dict[str, str] = {}
        self._single: dict[str, tuple[str, tuple[str, ...], int]] = {}
        for block in (*map.blocks, *map.mtp):
            self._look_at(block)
        gone = {name for _, names, _ in self._single.values() for name in names[count:]}
        self.tensors: Mapping[str, TensorEntry] = {
            name: self._entry(entry) for name, entry in whole.tensors.items() if name not in gone
        }

    def settle(self, layer: str, kept: Sequence[int]) -> None:
        """Say which experts of a layer stay, by their old numbers, rising."""
        assert len(kept) == self.count and list(kept) == sorted(set(kept)), (layer, kept)
        self.kept[layer] = tuple(kept)

    def read(self, name: str, part: Part = ()) -> Tensor:
        """As `TensorSource.read`."""
        if name not in self._stacked:
            return self.whole.read(self._old_name(name), part)
        parts = [self.whole.read(name, one) for one in self._parts(name, part)]
        return parts[0] if part and not isinstance(part[0], slice) else torch.stack(parts)

    def chunks(self, name: str, part: Part = ()) -> Iterator[memoryview]:
        """As `StoredSource.chunks`."""
        if name not in self._stacked:
            yield from self.whole.chunks(self._old_name(name), part)
            return
        for one in self._parts(name, part):
            yield from self.whole.chunks(name, one)

    def stamp(self) -> str:
        """That of the source."""
        return self.whole.stamp()

    def share(self, name: str) -> Fraction:
        """How much of what a tensor stands for in the source is left in it: `count` of the source's experts, or all."""
        return Fraction(self.count, self.before) if name in self._stacked or name in self._single else Fraction(1)

    def _look_at(self, block: Block) -> None:
        """Find the tensors of a layer that have one entry for each expert, and those that are one expert's."""
        label, singles = block.label, dict[str, list[str]]()
        for slot in block.slots:
            if slot.expert is None and slot.role.removeprefix(MTP) != "router":
                continue
            if slot.expert is None or slot.part:
                self._stacked[slot.tensor] = label
            else:
                singles.setdefault(slot.role, []).append(slot.tensor)
        for names in singles.values():
            self._single |= {name: (label, tuple(names), number) for number, name in enumerate(names)}

    def _entry(self, entry: TensorEntry) -> TensorEntry:
        return replace(entry, shape=(self.count, *entry.shape[1:])) if entry.name in self._stacked else entry

    def _kept(self, layer: str) -> tuple[int, ...]:
        assert layer in self.kept, f"nobody said which experts of {layer} stay"
        return self.kept[layer]

    def _old_name(self, name: str) -> str:
        if name not in self._single:
            return name
        label, names, number = self._single[name]
        return names[self._kept(label)[number]]

    def _parts(self, name: str, part: Part) -> Iterator[Part]:
        """The parts of the whole tensor that a part of the narrow one is made of, one for each expert."""
        kept = self._kept(self._stacked[name])
        first, rest = (part[0], part[1:]) if part else (slice(None), ())
        for expert in kept[first] if isinstance(first, slice) else (kept[first],):
            yield (expert, *rest)


def config_with_experts(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The config with so many routed experts, wherever it says how many there are."""
    changed = copy.deepcopy(dict(config))
    for part in (changed, changed.get("text_config")):
        if isinstance(part, dict) and COUNT in part:
            part[COUNT] = count
    return changed
