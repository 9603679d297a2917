"""Rounding in a walk, to nearest or by GPTQ, with EoRA beside it: sets that engines fuse at a time, from the second moment of what they read.

A layer is taken in stages, in the order in which its weights are used: what comes later is observed on what the rounding before it puts out, as it will be in
the release. Moments are summed up within a limit of memory, and those of experts one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from qwench.methods.eora import eora
from qwench.methods.feedback import GREATEST_DAMPING
from qwench.methods.gptq import GptqOptions, gptq
from qwench.methods.rtn import round_fused
from qwench.models.map import Block, Slot
from qwench.numerics import Quantized, Scheme
from qwench.recipe import Correct, GptqSettings, Quantize
from qwench.steps.fallbacks import ROUNDED
from qwench.steps.planning.jobs import WeightSet, weight_sets
from qwench.stream.live import LiveBlock
from qwench.stream.mixture import in_mixture, moments_of
from qwench.stream.observe import Moment
from qwench.stream.walk import Rows

STAGES = (("fc",), ("attention", "delta"), ("attention.o", "delta.out"), ("mlp",), ("mlp.down",))
"""Names of input sets (see `models.map.Block.inputs`) by when their modules run."""


@dataclass
class Rounding:
    """Attributes:
    settings: the recipe's step.
    correct: the recipe's correction, or None.
    schemes: module -> scheme of every weight that is quantized.
    reports: what became of each set, by its name.
    """

    settings: Quantize
    correct: Correct | None
    schemes: Mapping[str, Scheme]
    reports: dict[str, str] = field(default_factory=dict)
    needs_original = False

    @property
    def name(self) -> str:
        return self.settings.method + (" + eora" if self.correct else "")

    def __call__(self, live: LiveBlock, rows: Rows) -> None:
        sets: dict[str, list[WeightSet]] = {}
        for found in weight_sets(live.block, self.schemes):
            sets.setdefault(input_of(live.block, found.slots[0]), []).append(found)
        for names in stages(live.block):
            for name, moment in self._moments(live, rows, [name for name in names if name in sets]):
                for weights in sets[name]:
                    self._round(live, weights, moment)

    def _moments(self, live: LiveBlock, rows: Rows, names: list[str]) -> Iterable[tuple[str, Moment | None]]:
        return moments_of(live, rows, names) if self._reads_rows else ((name, None) for name in names)

    @property
    def _reads_rows(self) -> bool:
        return self.settings.method == "gptq" or self.correct is not None

    def _round(self, live: LiveBlock, weights: WeightSet, moment: Moment | None) -> None:
        values = [live.weight(slot) for slot in weights.slots]
        rounded = self._codes(weights, values, moment)
        for slot, value, quantized in zip(weights.slots, values, rounded, strict=True):
            if self.correct and moment is not None and live.block.component == "text":  # no engine adds one to an MTP head
                quantized, self.reports[f"{slot.module} eora"] = corrected(self.correct, value, quantized, moment)
            live.store(slot, quantized)

    def _codes(self, weights: WeightSet, values: list[Tensor], moment: Moment | None) -> list[Quantized]:
        if self.settings.method != "gptq":
            return round_fused(values, weights.scheme)
        assert moment is not None and moment.second is not None
        order = self.settings.gptq.order
        if order == "dynamic" and not weights.scheme.ordered:
            order = None  # a scheme without a place for the order
        options = GptqOptions(damping=damping_for(self.settings.gptq, moment), order=order, search=self.settings.gptq.search)
        rounded, report = gptq(
            values, moment.second, moment.count, weights.scheme, options, enough=self.settings.gptq.least_tokens
        )
        if report.fallback:
            self.reports[weights.name] = ROUNDED + report.fallback
        elif report.relative is not None:
            self.reports[weights.name] = (
                f"loss {report.relative:.3f} of rounding, damping {report.damping:g}, {report.dead} dead columns"
            )
        return rounded


def damping_for(settings: GptqSettings, moment: Moment) -> float:
    """The damping of a second moment: what the recipe says, and more where it was summed over few tokens for its columns."""
    scarce = settings.scarcity * len(moment.magnitude) / max(1, moment.count)
    return min(settings.damping + scarce, GREATEST_DAMPING)


def corrected(settings: Correct, value: Tensor, quantized: Quantized, moment: Moment) -> tuple[Quantized, str]:
    """A quantized weight with its low-rank correction, and what that gives back."""
    assert moment.second is not None
    found, report = eora(value, quantized, moment.second, moment.count, settings.rank)
    said = f"rank {report.rank}: {report.relative:.3f} of the output error is left"
    return found, said + (f" ({report.fallback})" if report.fallback else "")


def input_of(block: Block, slot: Slot) -> str:
    """The input set that a weight reads."""
    return next(name for name, slots in block.inputs.items() if slot in slots)


def stages(block: Block) -> Iterator[list[str]]:
    """Input sets in the order in which their modules run, those of one stage at the same time. A mixture of experts is one stage, for nothing in it changes what it
    reads: its moments are had one after the other (see `stream.mixture`)."""
    for kinds in STAGES:
        yield [name for name in block.inputs if name in kinds and not in_mixture(block, name)]
    yield [name for name in block.inputs if in_mixture(block, name)]
