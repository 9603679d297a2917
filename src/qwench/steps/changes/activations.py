"""Ranges of activations in a walk: what a finished layer's 4-bit modules read is looked at once, and each gets the divisor that engines round its input with.

It comes last, when weights are what the release holds. From then on the layer runs with its inputs rounded, those of 8-bit modules too, so that the next layer sees what the
release's layer puts out. Modules that read the same input share a range: q, k and v; gate and up; the two input projections of Gated DeltaNet.

The experts of a layer share one range unless the recipe says otherwise, those of gate and up one and those of down another: kernels that take a whole mixture at once keep
one divisor, the largest range's. Whether an expert was reached by tokens is then of no matter; where each has its own range, one that no token reached gets the
largest of the others, and the report names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import torch

from qwench.errors import CheckpointError
from qwench.methods.activation_range import BlockSizes, Examples, chosen_range, divisor
from qwench.models.map import Slot
from qwench.numerics import InputRounding, Scheme
from qwench.recipe import ActivationSettings
from qwench.steps.fallbacks import RANGE_OF_OTHERS
from qwench.stream.live import LiveBlock
from qwench.stream.observe import Take, taking_inputs
from qwench.stream.walk import Rows

NAMED = 8
"""Experts that a report names before it counts the rest."""


@dataclass
class ActivationRanges:
    """Attributes:
    settings: the recipe's.
    schemes: module -> scheme of every weight that is quantized.
    reports: what was found, by the layer and what is read.
    """

    settings: ActivationSettings
    schemes: Mapping[str, Scheme]
    reports: dict[str, str] = field(default_factory=dict)
    name = "activation ranges"
    needs_original = False

    def __call__(self, live: LiveBlock, rows: Rows) -> None:
        sets = {name: slots for name in live.block.inputs if (slots := self._slots(live, name, "nvfp4"))}
        kinds: dict[str, dict[str, BlockSizes]] = {}
        for name, sizes in self._observe(live, rows, list(sets)).items():
            kinds.setdefault(kind_of(name), {})[name] = sizes
        for kind, seen in kinds.items():
            self._settle(live, kind, seen, sets)
        for name in live.block.inputs:
            live.round_inputs({slot.module: InputRounding("fp8") for slot in self._slots(live, name, "fp8")})

    def _slots(self, live: LiveBlock, name: str, activations: str) -> list[Slot]:
        """Members of an input set whose input is rounded so."""
        schemes = ((slot, self.schemes.get(slot.module)) for slot in live.block.inputs[name])
        return [slot for slot, scheme in schemes if scheme is not None and scheme.activations == activations]

    def _observe(self, live: LiveBlock, rows: Rows, names: list[str]) -> dict[str, BlockSizes]:
        """What each set reads, on all rows."""
        seen = {name: BlockSizes(examples=Examples() if self.settings.range == "mse" else None) for name in names}
        if names:
            takers: dict[str, Take] = {name: sizes.add for name, sizes in seen.items()}
            with torch.no_grad(), taking_inputs(live, takers, reach=rows.reach):
                for batch in rows.batches():
                    live.run(batch)
        return seen

    def _settle(self, live: LiveBlock, kind: str, seen: Mapping[str, BlockSizes], sets: Mapping[str, list[Slot]]) -> None:
        """Give sets of one kind their ranges: a set by itself, or those of all experts."""
        reached = {name: sizes for name, sizes in seen.items() if sizes.tokens}
        if not reached:
            left_out = sum(sizes.left_out for sizes in seen.values())
            raise CheckpointError(
                f"{live.label}: of {left_out:,} calibration tokens that {kind} reads, not one is finite",
                "the checkpoint overflows: check its dtype and source, or calibrate on other text",
            )
        ranges = self._ranges(reached)
        for name in seen:
            outer = divisor(ranges.get(name, max(ranges.values())))
            for slot in sets[name]:
                live.quantized[slot.module].input_outer = torch.tensor([outer])
                live.round_inputs({slot.module: InputRounding("nvfp4", outer)})
        self.reports[f"{live.label} {kind} inputs"] = self._says(seen, ranges)

    def _ranges(self, reached: Mapping[str, BlockSizes]) -> dict[str, float]:
        """The range of each set that tokens reached."""
        if self.settings.experts == "shared":
            total = sum_of(reached.values())
            return dict.fromkeys(reached, chosen_range(total, self.settings.range, self.settings.percentile))
        return {n: chosen_range(sizes, self.settings.range, self.settings.percentile) for n, sizes in reached.items()}

    def _says(self, seen: Mapping[str, BlockSizes], ranges: Mapping[str, float]) -> str:
        """The report of one kind of set."""
        total, low, high = sum_of(seen.values()), min(ranges.values()), max(ranges.values())
        cut, coarse = total.share_above(high), total.share_coarse(high)
        parts = [
            f"range {low:.4g}"
            + (f" to {high:.4g}" if high > low else "")
            + f" by {self.settings.range}, largest {total.amax:.4g}"
        ]
        parts += [f"{total.tokens:,} tokens" + (f", {total.left_out:,} left out that are not finite" if total.left_out else "")]
        parts += [f"{cut:.2%} of blocks cut off"] * (cut > 0) + [f"{coarse:.2%} of blocks below the finest scales"] * (
            coarse > 0
        )
        if missed := [name for name, sizes in seen.items() if not sizes.tokens]:
            numbers = ", ".join(name.split(".")[1] for name in missed[:NAMED])
            parts.append(
                f"{len(missed)} {RANGE_OF_OTHERS} ({numbers}{' ...' if len(missed) > NAMED else ''}) have the largest range"
            )
        return "; ".join(parts)


def kind_of(name: str) -> str:
    """An input set without the number of its expert: `experts.7.down` is one of `experts.down`."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def sum_of(sizes: Iterable[BlockSizes]) -> BlockSizes:
    """All of them together."""
    return reduce(add, sizes)
