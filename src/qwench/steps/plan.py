"""What a run will do, from names and shapes alone: every tensor, every file, every byte, and every complaint, before any work.

The plan is made from a checkpoint on disk, or from a config with no weights at all (`models.sketch`): both are a `TensorSource`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qwench.checkpoint.source import TensorSource
from qwench.checkpoint.writer import FileLayout
from qwench.errors import PlanError
from qwench.formats import FORMATS
from qwench.models.map import ModelMap
from qwench.numerics.scheme import Scheme
from qwench.recipe import Recipe, byte_size, recipe_data
from qwench.steps.assign import Complaint, assign, assigned, shape_complaints, split_sets
from qwench.steps.jobs import COPY_BUFFER, Job, files_of, job_memory, jobs_of


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
        return max((job_memory(job, self.source) for job in self.jobs), default=0) + COPY_BUFFER


def make_plan(recipe: Recipe, source: TensorSource, map: ModelMap) -> Plan:
    """The plan of a recipe on a checkpoint. Raises PlanError with every complaint at once."""
    complaints = list(_source_complaints(source))
    schemes, notes, found = assign(recipe, map)
    complaints += found
    if recipe.correct:
        complaints.append(("EoRA corrections are computed but not yet written beside a release", "take the correct step out"))
    for block in (*map.blocks, *map.mtp):
        complaints += split_sets(block, schemes)
    container = FORMATS[recipe.export.format]
    complaints += shape_complaints(map, schemes, container)
    if complaints:
        raise PlanError(list(dict.fromkeys(complaints)))
    jobs = tuple(jobs_of(source, map, schemes, recipe.export.format))
    kept = tuple(s.module for s in map.slots() if s.linear and s.module not in schemes)
    modules = {s.module: scheme for s, scheme in assigned(map, schemes)}
    config = dict(source.config)
    if modules:
        config["quantization_config"] = container.quantization_config(modules, kept)
    notes += container.notes(modules.values())
    return Plan(
        recipe, source, map, jobs, files_of(jobs, byte_size(recipe.export.shard_size)), modules, kept, config, tuple(notes)
    )


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
