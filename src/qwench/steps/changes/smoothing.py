"""AWQ in a walk: for each fold of a layer, capture what its readers read, search scales, and move them.

The judge is the output of the whole module that reads: the MLP or mixture-of-experts block for `norm.post`, the mixer for `norm.input`, the down projection for an
up projection, the output projection for the values (see `judges`). Every reader of a norm is compensated, those that are not quantized too (router, shared expert's
gate, decay projections).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwench.checkpoint.source import TORCH_DTYPE, TensorSource
from qwench.methods.awq import Found, Output, Reader, SearchOptions, search_scales, together
from qwench.methods.clipping import Clipping, GroupMoments, clipped, search_limits
from qwench.methods.folding import Repeated, fold_norm, scale_columns, scale_rows, storable
from qwench.methods.rtn import shared_outer
from qwench.models.map import Fold, Slot
from qwench.numerics import Scheme
from qwench.recipe import Smooth, layer_range
from qwench.steps.changes.judges import (
    capture_module,
    inputs_one_by_one,
    is_mixture,
    linear_output,
    mixture_output,
    module_output,
    run_some,
)
from qwench.steps.changes.rounding import input_of
from qwench.steps.fallbacks import SILENT
from qwench.stream.head import STEM as MTP
from qwench.stream.head import with_plain_roles
from qwench.stream.live import LiveBlock
from qwench.stream.observe import taking_inputs
from qwench.stream.walk import Rows

NOT_CLIPPED = ("attention.q", "attention.k", "delta.qkv")
"""Roles whose outputs are multiplied with each other before anything judges them: rounding alone judges their ranges badly (AWQ's own rule)."""


@dataclass
class Smoothing:
    """Attributes:
    settings: the recipe's step.
    schemes: module -> scheme of every weight that will be quantized.
    source: for the dtypes that norms are stored in.
    reports: what each search said, by `layer N fold`, or `mtp layer 0 fold`.
    """

    settings: Smooth
    schemes: Mapping[str, Scheme]
    source: TensorSource
    reports: dict[str, str] = field(default_factory=dict)
    name = "awq"
    needs_original = False

    def __call__(self, live: LiveBlock, rows: Rows) -> None:
        wanted = self._folds_of(live)
        if not wanted:
            return
        live = with_plain_roles(live)
        for fold in live.block.folds:
            if fold.source in wanted:
                self._fold(live, rows, fold)
        if self.settings.clip:
            self._clip(live, rows)

    def _folds_of(self, live: LiveBlock) -> set[str]:
        """The folds that the recipe names for a layer, without `mtp.`; none for the head unless they are named as its own."""
        if live.block.component == "mtp":
            return {name.removeprefix(MTP) for name in self.settings.folds if name.startswith(MTP)}
        first, last = layer_range(self.settings.layers)
        if live.block.index < first or (last is not None and live.block.index > last):
            return set()
        return set(self.settings.folds)

    def _fold(self, live: LiveBlock, rows: Rows, fold: Fold) -> None:
        """Search and move the scales of one norm, or of every linear source of a role: one, or one for each expert."""
        pairs = [(source, readers_of(live, fold, source)) for source in live.block.slots if source.role == fold.source]
        pairs = [(source, readers) for source, readers in pairs if any(s.module in self.schemes for s in readers)]
        if not pairs:
            return
        key = f"{live.label} {fold.source}"
        if fold.source.startswith("norm."):
            self.reports[key] = self._norm(live, rows, fold, *pairs[0]).says
            return
        names = [input_of(live.block, readers[0]) for _, readers in pairs]
        found: list[Found] = []
        silent: list[int | None] = []
        for (source, readers), inputs in zip(pairs, inputs_one_by_one(live, rows, names), strict=True):
            if inputs:
                found.append(self._linear(live, fold, source, readers, inputs))
            else:
                silent.append(source.expert)
        self.reports[key] = together(found) + (f"; {SILENT}{silent}: 1 is kept" if silent else "")

    def _norm(self, live: LiveBlock, rows: Rows, fold: Fold, source: Slot, readers: list[Slot]) -> Found:
        weight, dtype = live.weight(source).clone(), TORCH_DTYPE[self.source.tensors[source.tensor].dtype]
        read, mixture = capture_module(live, rows, source), is_mixture(readers)
        output = mixture_output(live, readers) if mixture else module_output(live, source, readers, read)
        inputs = read.inputs
        if mixture:  # experts one after the other, each on all of its tokens
            inputs = [torch.cat([batch.flatten(0, -2) for batch in inputs])]
        found = self._search(live, readers, inputs, output, None, snap=(weight, fold.zero_centred, dtype), one_by_one=mixture)
        if not found.kept_one:
            live.alter(source, fold_norm(weight, found.scales, fold.zero_centred))
            self._compensate(live, readers, found.scales)
        return found

    def _linear(self, live: LiveBlock, fold: Fold, source: Slot, readers: list[Slot], inputs: list[Tensor]) -> Found:
        repeated = repetition(fold, source, readers[0])
        found = self._search(live, readers, inputs, linear_output, repeated)
        if not found.kept_one:
            live.alter(source, scale_rows(live.weight(source), found.scales))
            self._compensate(live, readers, repeated.spread(found.scales) if repeated else found.scales)
        return found

    def _search(
        self,
        live: LiveBlock,
        readers: list[Slot],
        inputs: list[Tensor],
        output: Output,
        repeated: Repeated | None,
        snap: tuple[Tensor, bool, torch.dtype] | None = None,
        one_by_one: bool = False,
    ) -> Found:
        def snapped(scales: Tensor) -> Tensor:
            assert snap is not None
            return storable(snap[0], scales, snap[1], snap[2])

        return search_scales(
            [Reader(live.weight(s), self.schemes.get(s.module), fused_name(live, s)) for s in readers],
            inputs,
            output,
            SearchOptions(self.settings.grid, self.settings.duo),
            snapped if snap else None,
            repeated,
            one_by_one,
        )

    def _compensate(self, live: LiveBlock, readers: list[Slot], scales: Tensor) -> None:
        for slot in readers:
            live.alter(slot, scale_columns(live.weight(slot), scales))

    def _clip(self, live: LiveBlock, rows: Rows) -> None:
        """Narrow the groups of weights that will be rounded, where that makes their own output better. All of a layer are judged by what they read before any
        of them is clipped."""
        chosen = [s for s in live.block.slots if s.module in self.schemes and s.role not in NOT_CLIPPED]
        sets = {input_of(live.block, slot) for slot in chosen}
        moments = {
            name: GroupMoments(slots[0].shape[1], self.schemes[next(s.module for s in slots if s in chosen)].group, live.device)
            for name, slots in live.block.inputs.items()
            if name in sets
        }
        with taking_inputs(live, {name: moment.add for name, moment in moments.items()}, reach=rows.reach):
            run_some(live, rows)
        found = [(slot, self._limits(live, slot, moments[input_of(live.block, slot)].sums)) for slot in chosen]
        for slot, narrowed in found:
            live.alter(slot, clipped(live.weight(slot), narrowed.limits))
        for role in dict.fromkeys(slot.role for slot in chosen):
            every = [narrowed for slot, narrowed in found if slot.role == role]
            self.reports[f"{live.label} {role} clip"] = said_of_clipping(every)

    def _limits(self, live: LiveBlock, slot: Slot, moments: Tensor) -> Clipping:
        scheme, name = self.schemes[slot.module], fused_name(live, slot)
        members = [s for s in live.block.fused.get(name, ()) if s.module in self.schemes] or [slot]
        outer = shared_outer([live.weight(s) for s in members], scheme)
        return search_limits(live.weight(slot), scheme, moments, outer)


def readers_of(live: LiveBlock, fold: Fold, source: Slot) -> list[Slot]:
    """The slots that read a source's channels: for an expert, its own."""
    return [s for s in live.block.slots if s.role in fold.readers and (source.expert is None or s.expert == source.expert)]


def repetition(fold: Fold, source: Slot, reader: Slot) -> Repeated | None:
    """How a source's channels lie in its reader's columns; None: one to one."""
    if fold.head is None:
        return None
    return Repeated(source.shape[0] // fold.head, reader.shape[1] // source.shape[0], fold.head)


def fused_name(live: LiveBlock, slot: Slot) -> str:
    """The set that engines fuse a weight into, or nothing."""
    return next((name for name, members in live.block.fused.items() if name != "experts" and slot in members), "")


def said_of_clipping(found: Sequence[Clipping]) -> str:
    """One line for the log, over the weights of one role."""
    share = sum(one.clipped_share * one.limits.numel() for one in found) / sum(one.limits.numel() for one in found)
    before, after = sum(one.before for one in found), sum(one.after for one in found)
    return f"{share:.1%} of the groups narrowed: loss {after / max(before, 1e-30):.3f}"
