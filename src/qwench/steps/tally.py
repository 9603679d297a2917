"""Counting a plan: what becomes of each component, in tensors, parameters and bytes."""

from __future__ import annotations

import math
from collections import defaultdict

from qwench.checkpoint.source import TensorSpec
from qwench.models.facts import component_of
from qwench.models.map import Slot
from qwench.result import PrecisionRow
from qwench.steps.plan import Plan

DTYPE_WORDS = {"BF16": "BF16", "F32": "FP32", "F16": "FP16", "F8_E4M3": "FP8"}


def precision_rows(plan: Plan) -> list[PrecisionRow]:
    """One row for each component and way of storing it, in the order of the network."""
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    slots_of: dict[str, list[Slot]] = defaultdict(list)
    for slot in plan.map.slots():
        slots_of[slot.tensor].append(slot)
    for job in plan.jobs:
        if job.quantized:
            for slot in job.quantized.slots:
                nbytes = sum(o.nbytes for o in job.outputs if o.name.startswith(slot.module + "."))
                _add(totals, component_of(slot.role), job.quantized.scheme.label, math.prod(slot.shape), nbytes)
        elif job.copied:
            stored: TensorSpec = job.copied
            word = DTYPE_WORDS.get(stored.dtype, stored.dtype)
            _add(totals, component_of(slots_of[stored.name][0].role), word, math.prod(stored.shape), stored.nbytes)
    return [PrecisionRow(component=c, stored=s, tensors=n, parameters=p, bytes=b) for (c, s), (n, p, b) in totals.items()]


def _add(totals: dict[tuple[str, str], list[int]], component: str, stored: str, parameters: int, nbytes: int) -> None:
    row = totals[component, stored]
    row[0] += 1
    row[1] += parameters
    row[2] += nbytes
