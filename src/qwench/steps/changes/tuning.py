"""AutoRound in a walk: all weights of a layer are tuned together, against what the original layer makes of the original rows.

The layer sees the rows as the quantized layers before it put them out, so that it learns to make up for their errors. Weights are tuned where the layer holds
them, and rows are read a batch at a time: beside the layer itself, what is in memory is the tuning's own (see `methods.autoround`) and one batch's activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwench.methods.autoround import Homes, Options, Report, tune_block
from qwench.methods.rtn import shared_outer
from qwench.models.map import Slot
from qwench.numerics import Quantized, Scheme
from qwench.recipe import Correct, Quantize
from qwench.steps.changes.rounding import Rounding, corrected, input_of
from qwench.steps.fallbacks import UNREACHED
from qwench.steps.planning.jobs import WeightSet, weight_sets
from qwench.stream.hidden import States
from qwench.stream.live import Batch, LiveBlock
from qwench.stream.mixture import moments_of
from qwench.stream.walk import Rows

ACTIVATIONS = 2 * 2**30
"""Bytes that may be held for the backward pass."""
JUDGE_FROM = 0.5
"""See `methods.tuned_block.Options`: a judgement takes a forward pass of all rows that judge, as much as three steps of 4 rows."""


@dataclass(frozen=True)
class Sound:
    """The rows of a file that are to be tuned on."""

    states: States
    rows: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.states.shape[1:])

    def pick(self, rows: Tensor, /) -> Tensor:
        return self.states.pick(self.rows[rows])


@dataclass(frozen=True)
class SoundInputs:
    """The rows that a layer reads and is tuned on."""

    all_rows: Rows
    rows: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.all_rows.changed.shape[1:])

    def pick(self, rows: Tensor, /) -> Batch:
        return self.all_rows.pick(self.rows[rows])


@dataclass
class Tuning:
    """Attributes:
    settings: the recipe's step.
    correct: the recipe's correction, or None.
    schemes: module -> scheme of every weight that is quantized.
    reports: what became of each layer.
    """

    settings: Quantize
    correct: Correct | None
    schemes: Mapping[str, Scheme]
    reports: dict[str, str] = field(default_factory=dict)
    name = "autoround"
    needs_original = True

    def __call__(self, live: LiveBlock, rows: Rows) -> None:
        sets = list(weight_sets(live.block, self.schemes))
        slots = {slot.module: slot for found in sets for slot in found.slots}
        if not slots:
            return
        originals = {module: live.weight(slot).clone() for module, slot in slots.items()}
        found, report = self._tuned(live, rows, slots, originals, outers_of(sets, originals))
        self.reports[f"{live.label} autoround"] = report.says
        if report.unreached:
            named = ", ".join(module.removeprefix(live.stem) for module in report.unreached)
            self.reports[f"{live.label} autoround{UNREACHED}"] = f"they stay as they started: {named}"
        for module, quantized in found.items():
            live.store(slots[module], quantized)
        if self.correct and live.block.component == "text":  # no engine adds one to an MTP head
            self._correct(live, rows, slots, originals)

    def _tuned(
        self,
        live: LiveBlock,
        rows: Rows,
        slots: Mapping[str, Slot],
        originals: Mapping[str, Tensor],
        outers: Mapping[str, Tensor | None],
    ) -> tuple[dict[str, Quantized], Report]:
        assert rows.targets is not None
        sound, settings = rows.sound.nonzero().flatten(), self.settings.autoround
        starts = self._starts(live, rows, slots) if settings.start == "gptq" else None
        with torch.enable_grad():
            return tune_block(
                lambda weights, inputs: live.run_with({**live.weights, **weights}, inputs),
                originals,
                {module: self.schemes[module] for module in slots},
                SoundInputs(rows, sound),
                Sound(rows.targets, sound),
                Options(settings.iterations, settings.batch, judge_from=JUDGE_FROM, activation_limit=ACTIVATIONS),
                outers,
                starts,
                homes_of(live, slots),
            )

    def _starts(self, live: LiveBlock, rows: Rows, slots: Mapping[str, Slot]) -> dict[str, Quantized]:
        """What GPTQ makes of the layer."""
        Rounding(self.settings.model_copy(update={"method": "gptq"}), None, self.schemes, self.reports)(live, rows)
        return {module: live.quantized[module] for module in slots}

    def _correct(self, live: LiveBlock, rows: Rows, slots: Mapping[str, Slot], originals: Mapping[str, Tensor]) -> None:
        assert self.correct is not None
        readers: dict[str, list[Slot]] = {}
        for slot in slots.values():
            readers.setdefault(input_of(live.block, slot), []).append(slot)
        for name, moment in moments_of(live, rows, [name for name in live.block.inputs if name in readers]):
            for slot in readers[name]:
                quantized, said = corrected(self.correct, originals[slot.module], live.quantized[slot.module], moment)
                self.reports[f"{slot.module} eora"] = said
                live.store(slot, quantized)


def outers_of(sets: list[WeightSet], originals: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The NVFP4 divisor of each weight: that of the set that engines fuse it into."""
    outers: dict[str, Tensor | None] = {}
    for found in sets:
        shared = shared_outer([originals[s.module] for s in found.slots], found.scheme)
        outers |= dict.fromkeys((s.module for s in found.slots), shared)
    return outers


def homes_of(live: LiveBlock, slots: Mapping[str, Slot]) -> Homes:
    """Where the layer holds its weights: experts are parts of a parameter of all of them."""
    places = {module: live.parameter(slot) for module, slot in slots.items()}
    return Homes({name: live.weights[name] for name, _ in places.values()}, places)
