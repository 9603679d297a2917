"""A plan as a person reads it, and as data."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console, Group

from qwench import display
from qwench.models.pruned import Pruned
from qwench.steps.heads.memory import gate_memory
from qwench.steps.planning.plan import Plan
from qwench.steps.planning.tally import precision_rows


def as_data(plan: Plan) -> dict[str, Any]:
    """Everything that the tables show, sizes in bytes."""
    whole, map = (s.whole, s.whole_map) if isinstance(s := plan.source, Pruned) else (s, plan.map)
    return {
        "recipe": plan.recipe.name,
        "source": str(plan.source.folder),
        "source_tensors": len(whole.tensors),
        "source_bytes": sum(t.nbytes for t in whole.tensors.values()),
        "quantized_tensors": plan.quantized_tensors,
        "kept_tensors": plan.kept_tensors,
        "bytes": plan.nbytes,
        "bits_per_quantized_weight": plan.bits_per_weight,
        "bits_per_parameter": 8 * plan.nbytes / _parameters(plan),
        "working_memory": plan.working_memory,
        "gate_memory": gate_memory(plan.recipe, whole, map, plan.changed),
        "files": [{"name": f.name, "tensors": len(f.tensors), "bytes": f.nbytes} for f in plan.files],
        "roles": role_rows(plan),
        "precision": [row.model_dump() for row in precision_rows(plan)],
        "notes": list(plan.notes),
    }


def role_rows(plan: Plan) -> list[dict[str, Any]]:
    """One row per role of a linear layer: its scheme, or the dtype that it keeps."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for slot in plan.map.slots():
        if not slot.linear:
            continue
        scheme = plan.schemes.get(slot.module)
        stored = scheme.label if scheme else f"kept {plan.source.tensors[slot.tensor].dtype}"
        role = "vision.*" if slot.role.startswith("vision.") else slot.role
        row = rows.setdefault((role, stored), {"role": role, "stored": stored, "weights": 0, "parameters": 0})
        row["weights"] += 1
        row["parameters"] += math.prod(slot.shape)
    return list(rows.values())


def _parameters(plan: Plan) -> int:
    return sum(math.prod(t.shape) for t in plan.source.tensors.values())


def show(plan: Plan, console: Console) -> None:
    """The tables of `qwench plan`."""
    data = as_data(plan)
    roles = display.table("Roles", ["role", "stored as", "weights", "parameters"], [tuple(r.values()) for r in data["roles"]])
    parts = display.table(
        "Components",
        ["component", "stored as", "tensors", "parameters", "size"],
        [(r.component, r.stored, r.tensors, r.parameters, display.size(r.bytes)) for r in precision_rows(plan)],
    )
    files = display.table("Files", ["file", "tensors", "bytes"], [(f["name"], f["tensors"], f["bytes"]) for f in data["files"]])
    console.print(Group(roles, "", parts, "", files, ""))
    console.print(
        f"{data['quantized_tensors']:,} weights quantized at {data['bits_per_quantized_weight']:.3f} bits each, "
        f"{data['kept_tensors']:,} tensors kept bit for bit"
    )
    console.print(
        f"{display.size(data['source_bytes'])} becomes {display.size(data['bytes'])}: {data['bytes'] / data['source_bytes']:.1%}, "
        f"{data['bits_per_parameter']:.2f} bits per parameter; memory expected above the interpreter's own: "
        f"{'about ' if plan.recipe.calibrated else ''}{display.size(data['working_memory'])}"
    )
    if data["gate_memory"]:
        console.print(
            f"at the end the MTP head is measured on held-out rows: {display.size(data['gate_memory'])} (acceptance: off does without)"
        )
    for note in plan.notes:
        console.print(f"note: {note}")
