"""A plan of GGUF files as a person reads it, as data, and counted for the record."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from rich.console import Console, Group

from qwench import display
from qwench.formats.gguf import GgufPlan
from qwench.models.facts import component_of
from qwench.result import PrecisionRow
from qwench.steps.gguf.plan import IMPORTANCE, GgufRelease, PlannedFile

GIB = 2**30
CONTENT_WORDS = {"model": "text and MTP head", "trunk": "text", "mtp": "MTP head (draft)", "vision": "vision tower"}


def content_words(plan: GgufPlan) -> str:
    """What is in a file, for a person; a checkpoint without a head gives a file without one."""
    return CONTENT_WORDS["trunk" if plan.content == "model" and not plan.map.has_mtp else plan.content]


def types_of(plan: GgufPlan) -> dict[str, int]:
    """Tensors of each type, the most frequent first."""
    return dict(Counter(tensor.type for tensor in plan.tensors).most_common())


def precision_rows(plan: GgufPlan) -> list[PrecisionRow]:
    """One row for each component and type of one file."""
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in plan.tensors:
        row = totals[component_of(tensor.tensor.role), tensor.type]
        for position, count in enumerate((1, tensor.parameters, tensor.nbytes)):
            row[position] += count
    return [PrecisionRow(component=c, stored=s, tensors=n, parameters=p, bytes=b) for (c, s), (n, p, b) in totals.items()]


def as_data(release: GgufRelease) -> dict[str, Any]:
    """Everything that the tables show, sizes in bytes."""
    return {
        "recipe": release.recipe.name,
        "source": str(release.source.folder),
        "source_tensors": len(release.source.tensors),
        "source_bytes": sum(t.nbytes for t in release.source.tensors.values()),
        "bytes": release.nbytes,
        "working_memory": release.working_memory,
        "files": [_file_data(file) for file in release.files],
        "importance": IMPORTANCE if release.export.importance else None,
        "notes": list(release.notes),
    }


def _file_data(file: PlannedFile) -> dict[str, Any]:
    plan = file.plan
    return {
        "name": file.name,
        "content": plan.content,
        "file_type": plan.file_type,
        "bytes": file.nbytes,
        "bits_per_weight": plan.bits_per_weight,
        "tensors": len(plan.tensors),
        "parameters": plan.parameters,
        "types": types_of(plan),
        "precision": [row.model_dump() for row in precision_rows(plan)],
    }


def _types_text(plan: GgufPlan) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in types_of(plan).items())


def show(release: GgufRelease, console: Console) -> None:
    """The tables of `qwench plan`."""
    rows = [
        (
            file.name,
            f"{file.nbytes / GIB:.2f} GiB",
            f"{file.plan.bits_per_weight:.2f}",
            content_words(file.plan),
            _types_text(file.plan),
        )
        for file in release.files
    ]
    columns = ["file", "size", "bits per weight", "holds", "tensors"]
    console.print(Group(display.table("Files", columns, rows), ""))
    source = sum(t.nbytes for t in release.source.tensors.values())
    console.print(
        f"from {display.size(source)}; {display.size(release.nbytes)} in all"
        f"{f', and {IMPORTANCE}' if release.export.importance else ''}; one tensor, or some of its rows, in memory at a time: "
        f"{display.size(release.working_memory)} above the interpreter's own"
    )
    for note in release.notes:
        console.print(f"note: {note}")
