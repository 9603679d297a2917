"""What a run will do, from names and shapes alone: every tensor, every file, every byte, and every complaint, before any work.

The plan is made from a checkpoint on disk, or from a config with no weights at all (`models.sketch`): both are a `TensorSource`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qwench import numerics
from qwench.checkpoint.source import BYTES_OF, TensorEntry, TensorSource, TensorSpec
from qwench.checkpoint.writer import FileLayout
from qwench.errors import PlanError
from qwench.formats import FORMATS, Container
from qwench.models.map import ROLES, Block, ModelMap, Slot
from qwench.numerics.scheme import Scheme
from qwench.recipe import Recipe, Rule, byte_size, layer_range, recipe_data, suggestion

Complaint = tuple[str, str]

NEVER = {
    "router": "quantized routing sends tokens to other experts",
    "shared.router": "quantized routing breaks the shared expert's gate",
    "delta.a": "engines keep the decay projection in 16 bits",
    "delta.b": "engines keep the write-strength projection in 16 bits",
    "embed": "engines look rows up in it and expect 16 bits",
}


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


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know.

    Attributes:
        recipe, source, map: what the plan was made from.
        jobs: the work, in the order in which files fill up.
        files: the layout of every safetensors file.
        schemes: module -> scheme of every quantized weight.
        kept_linears: modules of linear layers that stay as they are.
        config: the config.json of the release.
        notes: what a person should know and nothing has to change for.
    """

    recipe: Recipe
    source: TensorSource
    map: ModelMap
    jobs: tuple[Job, ...]
    files: tuple[FileLayout, ...]
    schemes: dict[str, Scheme]
    kept_linears: tuple[str, ...]
    config: dict[str, Any]
    notes: tuple[str, ...] = field(default=())

    @property
    def fingerprint(self) -> str:
        """Changes with the recipe, the source's tensors, or the layout of the result: what a resumed run must share."""
        source = [(e.name, e.dtype, e.shape, e.file, e.start) for e in self.source.tensors.values()]
        files = [(f.name, [(t.name, t.dtype, t.shape) for t in f.tensors]) for f in self.files]
        text = json.dumps([recipe_data(self.recipe), str(self.source.folder), source, files, self.config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def sidecars(self) -> dict[str, bytes]:
        """Files that the container wants besides config.json, by name."""
        config = self.config.get("quantization_config")
        return FORMATS[self.recipe.export.format].sidecars(config) if config else {}

    @property
    def quantized_tensors(self) -> int:
        """Weights that change their format."""
        return len(self.schemes)

    @property
    def kept_tensors(self) -> int:
        """Stored tensors that come out bit for bit."""
        return sum(job.copied is not None for job in self.jobs)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the release."""
        return sum(job.nbytes for job in self.jobs)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized weights alone, scales and outer scales included."""
        weights = sum(math.prod(slot.shape) for job in self.jobs if job.quantized for slot in job.quantized.slots)
        return 8 * sum(job.nbytes for job in self.jobs if job.quantized) / weights if weights else 0.0

    @property
    def working_memory(self) -> int:
        """Bytes that a run holds at the worst, above what the interpreter and its libraries take: one set of weights beside one copy."""
        return max((_job_memory(job, self.source) for job in self.jobs), default=0) + COPY_BUFFER


def make_plan(recipe: Recipe, source: TensorSource, map: ModelMap) -> Plan:
    """The plan of a recipe on a checkpoint. Raises PlanError with every complaint at once."""
    complaints = list(_source_complaints(source))
    schemes, notes, found = assign(recipe, map)
    complaints += found
    if recipe.correct:
        complaints.append(("EoRA corrections are computed but not yet written beside a release", "take the correct step out"))
    for block in (*map.blocks, *map.mtp):
        complaints += _split_sets(block, schemes)
    container = FORMATS[recipe.export.format]
    complaints += _shape_complaints(map, schemes, container)
    if complaints:
        raise PlanError(list(dict.fromkeys(complaints)))
    jobs = tuple(_jobs(source, map, schemes, recipe.export.format))
    kept = tuple(s.module for s in map.slots() if s.linear and s.module not in schemes)
    modules = {s.module: scheme for s, scheme in _assigned(map, schemes)}
    config = dict(source.config)
    if modules:
        config["quantization_config"] = container.quantization_config(modules, kept)
    notes += container.notes(modules.values())
    return Plan(
        recipe, source, map, jobs, _files(jobs, byte_size(recipe.export.shard_size)), modules, kept, config, tuple(notes)
    )


def assign(recipe: Recipe, map: ModelMap) -> tuple[dict[str, Scheme], list[str], list[Complaint]]:
    """Module -> scheme by the recipe's rules (later rules win), notes, and complaints about rules that cannot be meant."""
    schemes: dict[str, Scheme] = {}
    notes: list[str] = []
    complaints: list[Complaint] = []
    rules: Sequence[Rule] = recipe.quantize.rules if recipe.quantize else ()
    for number, rule in enumerate(rules, start=1):
        matched = 0
        for glob in rule.roles:
            slots = [s for s in map.slots() if _matches(glob, rule, s)]
            complaints += _rule_complaints(glob, slots, map, number)
            for slot in slots:
                if not slot.linear or slot.role.removeprefix("mtp.") in NEVER:
                    continue
                matched += 1
                scheme = _in_order(rule.resolved(), recipe)
                if scheme is None:
                    schemes.pop(slot.module, None)
                else:
                    schemes[slot.module] = scheme
        if not matched:
            complaints.append(
                (
                    f"rule {number} ({', '.join(rule.roles)}) names no weight of this {map.model_type} model",
                    "use roles that it has, see `qwench inspect`",
                )
            )
    return schemes, notes, complaints


def _in_order(scheme: Scheme | None, recipe: Recipe) -> Scheme | None:
    """The scheme as the recipe's method leaves it: GPTQ with dynamic order says which group each column is of, where there are groups."""
    step = recipe.quantize
    dynamic = step is not None and step.method == "gptq" and step.gptq.order == "dynamic"
    ordered = scheme is not None and dynamic and scheme.kind == "int" and scheme.group is not None
    return replace(scheme, ordered=True) if scheme is not None and ordered else scheme


def _matches(glob: str, rule: Rule, slot: Slot) -> bool:
    """Whether a rule's glob names a slot: a `*` does not reach into the MTP head or the tower, they are named."""
    for component in ("mtp.", "vision."):
        if slot.role.startswith(component) != glob.startswith(component):
            return False
    if not fnmatch.fnmatchcase(slot.role, glob):
        return False
    first, last = layer_range(rule.layers)
    if slot.layer is None:
        return rule.layers == "all"
    return first <= slot.layer and (last is None or slot.layer <= last)


def _rule_complaints(glob: str, slots: list[Slot], map: ModelMap, number: int) -> Iterator[Complaint]:
    known = [*ROLES, *(s.role for s in map.others if s.role.startswith("vision."))]
    if not fnmatch.filter(known, glob):
        yield f"rule {number}: no role is named {glob!r}{suggestion(glob, list(ROLES))}", "see the roles in docs/recipes.md"
    elif "*" not in glob and slots and (glob.removeprefix("mtp.") in NEVER or not slots[0].linear):
        why = NEVER.get(glob.removeprefix("mtp."), "it is not the matrix of a linear layer")
        yield f"rule {number}: {glob} is never quantized: {why}", f"take {glob} out of the rule"


def _split_sets(block: Block, schemes: dict[str, Scheme]) -> Iterator[Complaint]:
    """Engines join these at load: members that differ are read wrongly without a word."""
    for name, members in block.fused.items():
        found = {s.role: schemes.get(s.module) for s in members}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{role}: {scheme.label if scheme else 'kept'}" for role, scheme in found.items())
            where = "mtp " if block.component == "mtp" else ""
            yield (
                f"{where}layer {block.index}: engines fuse {name}, and its members differ ({said})",
                f"give {', '.join(found)} one scheme",
            )


def _shape_complaints(map: ModelMap, schemes: dict[str, Scheme], container: Container) -> Iterator[Complaint]:
    seen: set[tuple[str, Scheme]] = set()
    for slot, scheme in _assigned(map, schemes):
        if (slot.role, scheme) in seen:
            continue
        if complaint := numerics.complaint(scheme, slot.shape):
            mend = f"keep {slot.role}, or choose a scheme whose group divides {slot.shape[1]}"
        elif complaint := container.complaint(scheme, slot.shape):
            mend = f"keep {slot.role}, or choose a scheme or an export format ({', '.join(FORMATS)}) that fit each other"
        if complaint:
            seen.add((slot.role, scheme))
            yield f"{slot.module} {list(slot.shape)}: {complaint}", mend


def _source_complaints(source: TensorSource) -> Iterator[Complaint]:
    if "quantization_config" in source.config:
        method = source.config["quantization_config"].get("quant_method", "?")
        yield f"{source.folder} is already quantized ({method})", "start from the unquantized checkpoint"
    halves = [t.name for t in source.tensors.values() if t.dtype == "F16"]
    if halves:
        yield (
            f"{len(halves)} tensors are float16 ({halves[0]} first): Gated DeltaNet's intermediate values overflow it",
            "start from the bfloat16 or float32 checkpoint",
        )


def _assigned(map: ModelMap, schemes: dict[str, Scheme]) -> Iterator[tuple[Slot, Scheme]]:
    for slot in map.slots():
        if slot.module in schemes:
            yield slot, schemes[slot.module]


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


def _jobs(source: TensorSource, map: ModelMap, schemes: dict[str, Scheme], format: str) -> Iterator[Job]:
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


def _files(jobs: Sequence[Job], limit: int) -> tuple[FileLayout, ...]:
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


def _job_memory(job: Job, source: TensorSource) -> int:
    """Bytes that one job holds: the set's weights as stored, its packed result, and float32 working rows."""
    if job.quantized is None:
        return 0
    stored = sum(math.prod(s.shape) * BYTES_OF[source.tensors[s.tensor].dtype] for s in job.quantized.slots)
    return stored + job.nbytes + WORKING_ROWS
