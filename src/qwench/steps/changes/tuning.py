"""AutoRound in a walk: all weights of a layer are tuned together, against what the original layer makes of the original rows.

The layer sees the rows as the quantized layers before it put them out, so that it learns to make up for their errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwench.methods.autoround import Options, tune_block
from qwench.methods.rtn import shared_outer
from qwench.models.map import Slot
from qwench.models.weights import FUSED
from qwench.numerics import Scheme
from qwench.recipe import Correct, Quantize
from qwench.steps.changes.rounding import corrected, input_of
from qwench.steps.jobs import WeightSet, weight_sets
from qwench.stream.live import LiveBlock
from qwench.stream.mixture import moments_of
from qwench.stream.walk import Rows

ACTIVATIONS = 2 * 2**30
"""Bytes that may be held for the backward pass."""


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
        sets = list(weight_sets(live.block, dict(self.schemes)))
        slots = {slot.module: slot for found in sets for slot in found.slots}
        if not slots:
            return
        assert rows.targets is not None
        sound = rows.sound.nonzero().flatten()
        options = Options(self.settings.autoround.iterations, self.settings.autoround.batch, activation_limit=ACTIVATIONS)
        originals = {module: live.weight(slot).clone() for module, slot in slots.items()}
        found, report = tune_block(
            lambda weights, inputs: live.run_with(with_weights(live, slots, weights), inputs),
            originals,
            {module: self.schemes[module] for module in slots},
            rows.changed.pick(sound).to(live.dtype),
            rows.targets.pick(sound).to(live.dtype),
            options,
            outers_of(sets, originals),
        )
        self.reports[f"{live.label} autoround"] = report.says
        for module, quantized in found.items():
            live.store(slots[module], quantized)
        if self.correct and live.block.component == "text":  # no engine adds one to an MTP head
            self._correct(live, rows, slots, originals)

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


def with_weights(live: LiveBlock, slots: Mapping[str, Slot], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's parameters with other weights by module, so that gradients reach them; experts are stacked."""
    used = dict(live.weights)
    experts: dict[str, dict[tuple[int, int], Tensor]] = {}
    for module, weight in weights.items():
        slot = slots[module]
        name, _ = live.parameter(slot)
        if slot.expert is None:
            used[name] = weight
        else:
            experts.setdefault(name, {})[slot.expert, FUSED[slot.role.rpartition(".")[2]][1]] = weight
    for name, parts in experts.items():
        count, halves = len(live.weights[name]), 1 + max(half for _, half in parts)
        used[name] = torch.stack([torch.cat([parts[e, half] for half in range(halves)]) for e in range(count)])
    return used
