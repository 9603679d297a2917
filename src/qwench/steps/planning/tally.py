"""Counting a plan: what becomes of each component, in tensors, parameters and bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from fractions import Fraction

from qwench.checkpoint.source import BYTES_OF, TensorSpec
from qwench.models.facts import component_of
from qwench.models.map import Slot
from qwench.models.pruned import Pruned
from qwench.result import PrecisionRow
from qwench.steps.planning.plan import Plan

Totals = defaultdict[tuple[str, str], tuple[int, int, int, Fraction]]
"""By component and way of storing: tensors, parameters, bytes, bytes in the source."""
DTYPE_WORDS = {"BF16": "BF16", "F32": "FP32", "F16": "FP16", "F8_E4M3": "FP8"}


def precision_rows(plan: Plan) -> list[PrecisionRow]:
    """One row for each component and way of storing it, in the order of the network."""
    totals: Totals = defaultdict(lambda: (0, 0, 0, Fraction(0)))
    slots_of: dict[str, list[Slot]] = defaultdict(list)
    for slot in plan.map.slots():
        slots_of[slot.tensor].append(slot)
    for job in plan.jobs:
        if job.quantized:
            for slot in job.quantized.slots:
                nbytes = sum(o.nbytes for o in job.outputs if o.name.startswith(slot.module + "."))
                parameters = math.prod(slot.shape)
                before = _whole(plan, slot.tensor, parameters * BYTES_OF[plan.source.tensors[slot.tensor].dtype])
                _add(totals, component_of(slot.role), job.quantized.scheme.label, parameters, nbytes, before)
        elif job.copied:
            stored: TensorSpec = job.outputs[0]
            word = DTYPE_WORDS.get(stored.dtype, stored.dtype)
            role, before = slots_of[stored.name][0].role, _whole(plan, stored.name, job.copied.nbytes)
            _add(totals, component_of(role), word, math.prod(stored.shape), stored.nbytes, before)
    return [
        PrecisionRow(component=c, stored=s, tensors=n, parameters=p, bytes=b, source_bytes=round(before))
        for (c, s), (n, p, b, before) in totals.items()
    ]


def _whole(plan: Plan, tensor: str, nbytes: int) -> Fraction:
    """What bytes of a tensor stand for in the source: those of pruned experts too, shared among the ones that stay."""
    return nbytes / plan.source.share(tensor) if isinstance(plan.source, Pruned) else Fraction(nbytes)


def _add(totals: Totals, component: str, stored: str, parameters: int, nbytes: int, before: Fraction) -> None:
    row = totals[component, stored]
    totals[component, stored] = (row[0] + 1, row[1] + parameters, row[2] + nbytes, row[3] + before)
