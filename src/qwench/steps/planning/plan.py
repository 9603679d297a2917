"""What a run will do, from names and shapes alone: every tensor, every file, every byte, and every complaint, before any work.

The plan is made from a checkpoint on disk, or from a config with no weights at all (`models.sketch`): both are a `TensorSource`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwench.checkpoint.folder import INDEX_NAME
from qwench.checkpoint.source import StoredSource, TensorSource
from qwench.checkpoint.writer import SINGLE, FileLayout
from qwench.errors import PlanError
from qwench.formats import FORMATS, adapter
from qwench.models.geometry import read_geometry
from qwench.models.map import ModelMap
from qwench.numerics.scheme import Scheme
from qwench.recipe import Export, Recipe, recipe_data
from qwench.steps.materials.prune import prune_notes, with_fewer_experts
from qwench.steps.planning.assign import Complaint, assign, assigned, input_complaints, shape_complaints, split_sets
from qwench.steps.planning.jobs import COPY_BUFFER, Job, Storage, files_of, job_memory, jobs_of
from qwench.steps.planning.memory import walk_memory


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know.

    Attributes:
        recipe, source, map: what the plan was made from; where experts are pruned, source and map are without them (see `models.pruned`).
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
        recipe = {
            k: v for k, v in recipe_data(self.recipe).items() if k != "acceptance"
        }  # which is asked of the bytes, and makes none
        text = json.dumps([recipe, str(self.source.folder), source, files, self.config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def sidecars(self) -> dict[str, bytes]:
        """Files that the container wants besides config.json, by name."""
        config = self.config.get("quantization_config")
        found = FORMATS[self.recipe.export.format].sidecars(config) if config else {}
        corrected = self.corrected
        if corrected and self.recipe.correct:
            data = adapter.adapter_config(corrected, self.recipe.correct.rank, base="..")
            found[f"{adapter.FOLDER}/{adapter.CONFIG_NAME}"] = (json.dumps(data, indent=2) + "\n").encode()
        return found

    @property
    def corrected(self) -> dict[str, tuple[int, ...]]:
        """Module -> (out, in) of every weight with a low-rank correction."""
        sets = [job.quantized for job in self.jobs if job.quantized and job.adapter]
        return {slot.module: slot.shape for found in sets for slot in found.slots}

    @property
    def quantized_tensors(self) -> int:
        """Weights that change their format."""
        return len(self.schemes)

    @property
    def kept_tensors(self) -> int:
        """Stored tensors that come out bit for bit."""
        return sum(job.copied is not None and job.outputs[0].dtype == job.copied.dtype for job in self.jobs)

    @property
    def changed(self) -> bool:
        """Whether the release differs from its source in any number."""
        return self.recipe.prune is not None or self.kept_tensors < len(self.jobs)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the release."""
        return sum(job.nbytes for job in self.jobs)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the low-rank corrections beside it."""
        return sum(tensor.nbytes for job in self.jobs for tensor in job.adapter)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized weights alone, scales and outer scales included."""
        weights = sum(math.prod(slot.shape) for job in self.jobs if job.quantized for slot in job.quantized.slots)
        return 8 * sum(job.nbytes for job in self.jobs if job.quantized) / weights if weights else 0.0

    @property
    def working_memory(self) -> int:
        """Bytes that a run holds above what the interpreter and its libraries take: at the worst one set of weights beside one copy; where the recipe reads rows, one layer of the
        walk in float32 and what its methods hold beside it (see `memory`)."""
        rounding = max((job_memory(job, self.source) for job in self.jobs), default=0) + COPY_BUFFER
        return (
            max(rounding, walk_memory(self.recipe, self.map, self.source, self.schemes)) if self.recipe.calibrated else rounding
        )


def make_plan(recipe: Recipe, source: StoredSource, map: ModelMap) -> Plan:
    """The plan of a recipe on a checkpoint. Raises PlanError with every complaint at once."""
    complaints = list(_source_complaints(source))
    if recipe.prune:
        source, map, found = with_fewer_experts(recipe.prune, source, map)
        complaints += found
    schemes, notes, found = assign(recipe, map)
    complaints += found
    for block in (*map.blocks, *map.mtp):
        complaints += split_sets(block, schemes)
    container = FORMATS[recipe.export.format]
    complaints += shape_complaints(map, schemes, container)
    complaints += input_complaints(map, schemes, recipe)
    if complaints:
        raise PlanError(list(dict.fromkeys(complaints)))
    schemes = {slot.module: scheme for slot, scheme in assigned(map, schemes)}  # in the network's order
    storage = Storage(source, schemes, recipe.export, recipe.correct.rank if recipe.correct else 0)
    jobs = tuple(jobs_of(storage, map))
    kept = tuple(s.module for s in map.slots() if s.linear and s.module not in schemes)
    files = files_of(jobs, recipe.export)
    config = stored_config(source.config, recipe.export, files)
    if schemes:
        config["quantization_config"] = container.quantization_config(schemes, kept)
    notes += container.notes(schemes.values())
    notes += prune_notes(source)
    if recipe.calibration and recipe.calibration.experts == "all" and not read_geometry(source.config).moe:
        notes.append("calibration says experts: all, and this model has none: it changes nothing")
    return Plan(recipe, source, map, jobs, files, schemes, kept, config, tuple(notes))


def stored_config(config: dict[str, Any], export: Export, files: Sequence[FileLayout]) -> dict[str, Any]:
    """The config of a release: its text's dtype, and where transformers finds its files.

    Transformers takes a `model.safetensors` for the whole model even where an index names further files, and fills the rest with random numbers;
    `transformers_weights` sends it to the index.
    """
    stored: dict[str, Any] = json.loads(json.dumps(config))
    word = export.dtype_of("text")
    if word != "source":
        for part in (stored, stored.get("text_config")):
            for key in ("dtype", "torch_dtype"):
                if isinstance(part, dict) and key in part:
                    part[key] = word
    names = [file.name for file in files if "/" not in file.name]
    if SINGLE in names and len(names) > 1:
        stored["transformers_weights"] = INDEX_NAME
    else:
        stored.pop("transformers_weights", None)
    return stored


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
