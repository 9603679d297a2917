"""The work of a run as jobs: what is copied, what is quantized together, and which file each result goes to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwench.checkpoint.source import BYTES_OF, TensorEntry, TensorSource, TensorSpec
from qwench.checkpoint.writer import FileLayout
from qwench.formats import FORMATS
from qwench.models.map import Block, ModelMap, Slot
from qwench.numerics.scheme import Scheme


@dataclass(frozen=True)
class WeightSet:
    """Weights that are quantized together: one scheme, and one outer scale where the scheme has one."""

    name: str
    slots: tuple[Slot, ...]
    scheme: Scheme


@dataclass(frozen=True)
class Job:
    """One unit of work: a stored tensor that is copied bit for bit, or a set of weights that is quantized.

    Attributes:
        copied: the stored tensor, or None.
        quantized: the set, or None.
        format: the container that the set is packed in.
        outputs: what it writes.
    """

    outputs: tuple[TensorSpec, ...]
    copied: TensorEntry | None = None
    quantized: WeightSet | None = None
    format: str = "compressed-tensors"

    @property
    def nbytes(self) -> int:
        return sum(o.nbytes for o in self.outputs)


def weight_sets(block: Block, schemes: dict[str, Scheme]) -> Iterator[WeightSet]:
    """The quantized weights of a block: first what engines fuse, then each other weight by itself."""
    done: set[str] = set()
    for name, members in block.fused.items():
        first = members[0]
        same_input = all(m.expert == first.expert for m in members)
        if first.module in schemes and same_input and first.module not in done:
            yield WeightSet(f"{first.module.rpartition('.')[0]}.{name}", members, schemes[first.module])
            done.update(m.module for m in members)
    for slot in block.slots:
        if slot.module in schemes and slot.module not in done:
            yield WeightSet(slot.module, (slot,), schemes[slot.module])


def jobs_of(source: TensorSource, map: ModelMap, schemes: dict[str, Scheme], format: str) -> Iterator[Job]:
    """Copies and quantized sets, layer by layer; what stands outside of layers goes where it is stored: embedding first, tower last."""
    outside: dict[str, list[Slot]] = {}
    for slot in map.others:
        outside.setdefault(slot.role.partition(".")[0], []).append(slot)
    single = [WeightSet(s.module, (s,), schemes[s.module]) for s in map.others if s.module in schemes]
    by_module = {w.name: w for w in single}

    def others(*components: str) -> Iterator[Job]:
        for component in components:
            for slot in outside.pop(component, []):
                yield (
                    _quantized(by_module[slot.module], source, format)
                    if slot.module in by_module
                    else _copy(source.tensors[slot.tensor])
                )

    yield from others("embed")
    for block in map.blocks:
        yield from _block_jobs(block, source, schemes, format)
    yield from others("norm", "head", "mtp")
    for block in map.mtp:
        yield from _block_jobs(block, source, schemes, format)
    yield from others(*list(outside))


def _block_jobs(block: Block, source: TensorSource, schemes: dict[str, Scheme], format: str) -> Iterator[Job]:
    kept = dict.fromkeys(s.tensor for s in block.slots if s.module not in schemes)
    for tensor in kept:
        yield _copy(source.tensors[tensor])
    for weights in weight_sets(block, schemes):
        yield _quantized(weights, source, format)


def _copy(entry: TensorEntry) -> Job:
    return Job((TensorSpec(entry.name, entry.dtype, entry.shape),), copied=entry)


def _quantized(weights: WeightSet, source: TensorSource, format: str) -> Job:
    outputs: list[TensorSpec] = []
    for slot in weights.slots:
        dtype = source.tensors[slot.tensor].dtype
        outputs += FORMATS[format].layout(slot.module, slot.shape, weights.scheme, dtype)
    return Job(tuple(outputs), quantized=weights, format=format)


def files_of(jobs: Sequence[Job], limit: int) -> tuple[FileLayout, ...]:
    """Fill files up to the limit; a job's tensors stay together."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for job in jobs:
        if groups[-1] and filled + job.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1] += job.outputs
        filled += job.nbytes
    if len(groups) == 1:
        return (FileLayout("model.safetensors", tuple(groups[0])),)
    return tuple(FileLayout(f"model-{n:05d}-of-{len(groups):05d}.safetensors", tuple(g)) for n, g in enumerate(groups, start=1))


COPY_BUFFER = 2**20
WORKING_ROWS = 16 * 2**20
"""Bytes that rounding holds besides a weight and its result: float32 tiles of a few workers."""


def job_memory(job: Job, source: TensorSource) -> int:
    """Bytes that one job holds: the set's weights as stored, its packed result, and float32 working rows."""
    if job.quantized is None:
        return 0
    stored = sum(math.prod(s.shape) * BYTES_OF[source.tensors[s.tensor].dtype] for s in job.quantized.slots)
    return stored + job.nbytes + WORKING_ROWS
