"""The work of a run as jobs: what is copied, what is quantized together, and which file each result goes to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qwench.checkpoint.source import BYTES_OF, TensorEntry, TensorSource, TensorSpec
from qwench.checkpoint.writer import FileLayout
from qwench.formats import FORMATS, adapter
from qwench.models.map import Block, ModelMap, Slot
from qwench.numerics.scheme import Scheme
from qwench.recipe import Export, byte_size
from qwench.recipe.steps import Component

SCALES = "BF16"
"""What plain scales are stored in, whatever the source's dtype: engines hold them in what they compute in."""
PLAIN_CODE = {"bfloat16": "BF16", "float32": "F32"}
PLAIN = frozenset({"BF16", "F32", "F64"})
"""Dtypes that may be converted into each other."""


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
        adapter: the tensors of low-rank corrections, which go to a folder of their own.
        component: what it belongs to, where components get files of their own.
    """

    outputs: tuple[TensorSpec, ...]
    copied: TensorEntry | None = None
    quantized: WeightSet | None = None
    format: str = "compressed-tensors"
    adapter: tuple[TensorSpec, ...] = ()
    component: Component = "text"

    @property
    def written(self) -> tuple[TensorSpec, ...]:
        """Everything that it writes."""
        return self.outputs + self.adapter

    @property
    def nbytes(self) -> int:
        return sum(o.nbytes for o in self.outputs)


def weight_sets(block: Block, schemes: Mapping[str, Scheme]) -> Iterator[WeightSet]:
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


@dataclass(frozen=True)
class Storage:
    """How a release stores what a run makes of a checkpoint.

    Attributes:
        source: the checkpoint.
        schemes: module -> scheme of every quantized weight.
        export: the recipe's last step.
        rank: of the low-rank corrections of the trunk's quantized weights; 0 for none.
    """

    source: TensorSource
    schemes: Mapping[str, Scheme]
    export: Export
    rank: int = 0

    def dtype(self, slot: Slot) -> str:
        """The safetensors code that a weight's plain numbers get: its own, or what the recipe says for its component."""
        stored, wanted = self.source.tensors[slot.tensor].dtype, self.export.dtype_of(component_of(slot))
        return stored if wanted == "source" or stored not in PLAIN else PLAIN_CODE[wanted]

    def copied(self, slot: Slot) -> Job:
        """A kept tensor: bit for bit, or in another dtype."""
        entry = self.source.tensors[slot.tensor]
        return Job((TensorSpec(entry.name, self.dtype(slot), entry.shape),), copied=entry, component=component_of(slot))

    def quantized(self, weights: WeightSet) -> Job:
        """A set of quantized weights, and their corrections."""
        outputs: list[TensorSpec] = []
        corrected: dict[str, tuple[int, ...]] = {}
        container = FORMATS[self.export.format]
        for slot in weights.slots:
            outputs += container.layout(slot.module, slot.shape, weights.scheme, SCALES)
            if self.corrects(slot):
                corrected[slot.module] = slot.shape
        return Job(
            tuple(outputs),
            quantized=weights,
            format=self.export.format,
            adapter=tuple(adapter.layout(corrected, self.rank)) if corrected else (),
            component=component_of(weights.slots[0]),
        )

    def corrects(self, slot: Slot) -> bool:
        """Whether a weight gets a low-rank correction: quantized ones of the trunk's layers, since no engine adds one to an MTP head."""
        return self.rank > 0 and slot.module in self.schemes and slot.layer is not None and component_of(slot) == "text"


def component_of(slot: Slot) -> Component:
    """Which component a weight belongs to."""
    head = slot.role.partition(".")[0]
    return "mtp" if head == "mtp" else "vision" if head == "vision" else "text"


def jobs_of(storage: Storage, map: ModelMap) -> Iterator[Job]:
    """Copies and quantized sets, layer by layer; what stands outside of layers goes where it is stored: embedding first, tower last."""
    outside: dict[str, list[Slot]] = {}
    for slot in map.others:
        outside.setdefault(slot.role.partition(".")[0], []).append(slot)

    def others(*components: str) -> Iterator[Job]:
        for component in components:
            for slot in outside.pop(component, []):
                scheme = storage.schemes.get(slot.module)
                yield storage.quantized(WeightSet(slot.module, (slot,), scheme)) if scheme else storage.copied(slot)

    yield from others("embed")
    for block in map.blocks:
        yield from _block_jobs(block, storage)
    yield from others("norm", "head", "mtp")
    for block in map.mtp:
        yield from _block_jobs(block, storage)
    yield from others(*list(outside))


def _block_jobs(block: Block, storage: Storage) -> Iterator[Job]:
    kept = {slot.tensor: slot for slot in block.slots if slot.module not in storage.schemes}
    for slot in kept.values():
        yield storage.copied(slot)
    for weights in weight_sets(block, storage.schemes):
        yield storage.quantized(weights)


def files_of(jobs: Sequence[Job], export: Export) -> tuple[FileLayout, ...]:
    """Components to their files, each filled up to the limit; a job's tensors stay together. Corrections lie in one file of their own folder."""
    limit = byte_size(export.shard_size)
    apart = {component: name for name, components in export.files.items() for component in components}
    files: list[FileLayout] = []
    for name in ("model", *export.files):
        files += _shards(name, [job for job in jobs if apart.get(job.component, "model") == name], limit)
    corrections = tuple(tensor for job in jobs for tensor in job.adapter)
    if corrections:
        files.append(FileLayout(f"{adapter.FOLDER}/{adapter.WEIGHTS_NAME}", corrections))
    return tuple(files)


def _shards(stem: str, jobs: Sequence[Job], limit: int) -> Iterator[FileLayout]:
    groups: list[list[TensorSpec]] = []
    filled = limit
    for job in jobs:
        if not groups or (groups[-1] and filled + job.nbytes > limit):
            groups.append([])
            filled = 0
        groups[-1] += job.outputs
        filled += job.nbytes
    for number, group in enumerate(groups, start=1):
        name = stem if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}"
        yield FileLayout(f"{name}.safetensors", tuple(group))


COPY_BUFFER = 2**20
WORKING_ROWS = 16 * 2**20
"""Bytes that rounding holds besides a weight and its result: float32 tiles of a few workers."""


def job_memory(job: Job, source: TensorSource) -> int:
    """Bytes that one job holds: the set's weights as stored, its packed result, and float32 working rows."""
    if job.quantized is None:
        return 0
    stored = sum(math.prod(s.shape) * BYTES_OF[source.tensors[s.tensor].dtype] for s in job.quantized.slots)
    return stored + job.nbytes + WORKING_ROWS
