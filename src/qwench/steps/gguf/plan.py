"""What a GGUF release will be, from names and shapes alone: every file, its bytes, every tensor's type, and every complaint, before any work.

    NAME-Q4_K_M.gguf              text with its MTP head, one for each type
    NAME-trunk-Q4_K_M.gguf        the same without the head (content: trunk-only)
    mtp-NAME-Q4_K_M.gguf          the head alone, a draft file (content: mtp-only)
    mmproj-NAME-BF16.gguf         the tower
    imatrix.gguf                  importance, where the recipe asks for it

The names are those that people who publish GGUF files use, and the prefixes those by which llama.cpp's tools find the companions of a model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwench.checkpoint.source import TensorSource
from qwench.errors import PlanError
from qwench.formats.gguf import Content, GgufPlan, Override, fields_of, plan_gguf
from qwench.formats.gguf_importance import Importance, read_importance
from qwench.formats.gguf_tensors import gguf_tensors
from qwench.formats.gguf_types import UNQUANTIZED
from qwench.formats.gguf_writer import header, working_memory
from qwench.models.map import ModelMap
from qwench.recipe import ExportGguf, Recipe, recipe_data
from qwench.steps.planning.assign import Complaint

IMPORTANCE = "imatrix.gguf"
CONTENTS: dict[str, Content] = {"model": "model", "trunk-only": "trunk", "mtp-only": "mtp"}
"""A recipe's words for what a file holds."""
NO_HEADER = "sizes are those of the tensors: there is no tokenizer here, which takes some 0.01 GiB of each file of text"


@dataclass(frozen=True)
class PlannedFile:
    """One file of the release.

    Attributes:
        name: in the folder.
        plan: its tensors.
        header: bytes before the first tensor; 0 where there is no tokenizer to count.
        header_sha256: of these bytes; "" likewise.
    """

    name: str
    plan: GgufPlan
    header: int = 0
    header_sha256: str = ""

    @property
    def nbytes(self) -> int:
        return self.header + self.plan.tensor_bytes


@dataclass(frozen=True)
class GgufRelease:
    """Everything that a run needs to know.

    Attributes:
        recipe, export, source, map: what the plan was made from.
        name: of the model, for file names and for people.
        files: all but imatrix.gguf, whose size depends on what the rows reach.
        importance: that of the recipe's file, where it names one.
        notes: what a person should know and nothing has to change for.
    """

    recipe: Recipe
    export: ExportGguf
    source: TensorSource
    map: ModelMap
    name: str
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]
    importance: Importance | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all files, imatrix.gguf left out."""
        return sum(file.nbytes for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Changes with the recipe, the source's tensors, its tokenizer, or the layout of a file: what a resumed run must share."""
        source = [(e.name, e.dtype, e.shape, e.file, e.start) for e in self.source.tensors.values()]
        files = [(f.name, f.header_sha256, [(t.tensor.name, t.type) for t in f.plan.tensors]) for f in self.files]
        text = json.dumps(
            [recipe_data(self.recipe), str(self.source.folder), source, files, self.source.config], sort_keys=True
        )
        given = self.importance.file.read_bytes() if self.importance and self.importance.file else b""
        return hashlib.sha256(text.encode() + given).hexdigest()

    @property
    def working_memory(self) -> int:
        """Bytes that writing takes at the worst, above what the interpreter and its libraries take: one tensor, or some of its rows."""
        return max(working_memory(file.plan, self.source) for file in self.files)


def make_gguf_plan(recipe: Recipe, source: TensorSource, map: ModelMap, model: str) -> GgufRelease:
    """The plan of a recipe with a gguf export.

    Args:
        recipe: what is wanted.
        source: a checkpoint, a view of one, or a sketch from a config.
        map: its map.
        model: what the model is called: a hub id, or the name of a folder.

    Raises:
        PlanError: with every complaint at once.
        CheckpointError: the recipe's importance file is none, or of another model; the folder lacks what the metadata is made from.
    """
    export = recipe.gguf
    assert export is not None
    complaints = list(_complaints(export, source, map))
    if complaints:
        raise PlanError(complaints)
    name, notes = file_stem(model), list(_absences(export, map))
    plans, complaints = _plans(export, source, map, name)
    if complaints:
        raise PlanError(complaints)
    importance = _importance_file(export, plans.values())
    headers = _headers(plans.values(), source)
    files = tuple(PlannedFile(file, plan, *headers.get(plan.content, (0, ""))) for file, plan in plans.items())
    notes += [f"{file.name}: {note}" for file in files for note in file.plan.notes]
    if not headers:
        notes.append(NO_HEADER)
    return GgufRelease(recipe, export, source, map, name, files, tuple(notes), importance)


def file_stem(model: str) -> str:
    """What a model is called in file names: the last part of its id, without characters that a shell or a hub would not have."""
    last = model.rstrip("/").rpartition("/")[2].partition("@")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "model"


def file_name(stem: str, content: Content, file_type: str) -> str:
    """See the module's list."""
    if content == "vision":
        return f"mmproj-{stem}-{file_type}.gguf"
    if content == "mtp":
        return f"mtp-{stem}-{file_type}.gguf"
    return f"{stem}{'-trunk' if content == 'trunk' else ''}-{file_type}.gguf"


def _complaints(export: ExportGguf, source: TensorSource, map: ModelMap) -> Iterator[Complaint]:
    if "quantization_config" in source.config:
        method = source.config["quantization_config"].get("quant_method", "?")
        yield f"{source.folder} is already quantized ({method})", "start from the unquantized checkpoint"
    if "mtp-only" in export.content and not map.has_mtp:
        yield "the checkpoint has no MTP head, so no draft file can be made of it", "graft one first, or leave mtp-only out"
    contents = [CONTENTS[c] for c in export.content if CONTENTS[c] != "mtp" or map.has_mtp]
    tensors = [t for content in contents for t in gguf_tensors(source.config, map, content)]
    for roles in dict.fromkeys(roles for override in export.overrides for roles in override.roles):
        if not any(Override(roles, "").names(tensor) for tensor in tensors):
            yield f"no tensor of a file has a role like {roles!r}, which overrides name", "see the roles in docs/recipes.md"


def _absences(export: ExportGguf, map: ModelMap) -> Iterator[str]:
    """What the checkpoint lacks, and what the release therefore has not."""
    if not map.has_mtp:
        yield "the checkpoint has no MTP head, so no file can draft: graft one (a graft step and --donor) for speculation"
    if export.mmproj != "none" and not map.has_vision:
        yield "the checkpoint has no vision tower: no mmproj file is made"


def _plans(export: ExportGguf, source: TensorSource, map: ModelMap, name: str) -> tuple[dict[str, GgufPlan], list[Complaint]]:
    """Each file's plan by its name, and what is wrong with any of them."""
    wanted: list[tuple[Content, str]] = [(CONTENTS[c], kind.upper()) for c in export.content for kind in export.types]
    if export.mmproj != "none" and map.has_vision:
        wanted.append(("vision", export.mmproj))
    plans: dict[str, GgufPlan] = {}
    complaints: list[Complaint] = []
    for content, kind in wanted:
        try:
            plans[file_name(name, content, kind)] = plan_gguf(
                source, map, file_type=kind, content=content, overrides=_overrides(export, source, map, content, kind), name=name,
                importance=bool(export.importance),
            )  # fmt: skip
        except PlanError as error:
            complaints += [c for c in error.complaints if c not in complaints]
    return plans, complaints


def _overrides(export: ExportGguf, source: TensorSource, map: ModelMap, content: Content, kind: str) -> list[Override]:
    """Those that name something in a file. Unquantized files and the tower have none."""
    if content == "vision" or kind in UNQUANTIZED:
        return []
    tensors = gguf_tensors(source.config, map, content)
    every = [Override(roles, override.type.upper()) for override in export.overrides for roles in override.roles]
    return [override for override in every if any(override.names(tensor) for tensor in tensors)]


def _importance_file(export: ExportGguf, plans: Iterable[GgufPlan]) -> Importance | None:
    """The importance that the recipe names by its path. Raises CheckpointError where it does not fit the files."""
    if not isinstance(export.importance, str):
        return None
    found = read_importance(Path(export.importance).expanduser())
    for plan in plans:
        if plan.content != "vision":
            found.check(plan)
    return found


def _headers(plans: Iterable[GgufPlan], source: TensorSource) -> dict[Content, tuple[int, str]]:
    """Bytes and SHA-256 of the header of each content; they differ between types in one number of fixed width. Empty where there are no weights, hence no tokenizer.

    Raises CheckpointError where the folder lacks what a header is made from.
    """
    if not all(entry.file for entry in source.tensors.values()):
        return {}
    found: dict[Content, tuple[int, str]] = {}
    for plan in plans:
        if plan.content not in found:
            data = header(plan, fields_of(plan, source))
            found[plan.content] = (len(data), hashlib.sha256(data).hexdigest())
    return found
