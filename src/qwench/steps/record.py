"""The first record of a release: what it was made from and what became of it. Measurements are added later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import yaml

from qwench.checkpoint.hub import Located
from qwench.checkpoint.source import TensorSource
from qwench.models import survey
from qwench.models.geometry import read_geometry
from qwench.models.map import ModelMap
from qwench.models.place import Place, peak_vram
from qwench.models.pruned import Pruned
from qwench.recipe.shared import public_data
from qwench.result import CalibrationFacts, FileFact, PrunedLayer, PruningFacts, Result, RunFacts, SourceFacts, TensorError
from qwench.steps.calibrate import PRUNED, Calibrated
from qwench.steps.materials.material import Material
from qwench.steps.planning.plan import Plan
from qwench.steps.planning.readers import planned_proofs
from qwench.steps.planning.tally import precision_rows
from qwench.stream.rows import Rows


class PlaceFacts(TypedDict):
    """Fields of `RunFacts`."""

    device: str
    compute: str
    peak_vram: int | None


def first_record(
    plan: Plan, material: Material, errors: Sequence[TensorError], facts: RunFacts, calibration: CalibrationFacts | None
) -> Result:
    """The record of a finished run."""
    return Result(
        recipe=public_data(plan.recipe),
        source=source_facts(material.origin, survey(material.origin).map, material.located),
        files=[FileFact(name=f.name, bytes=f.nbytes) for f in plan.files],
        precision=precision_rows(plan),
        errors=sorted(errors, key=lambda e: (e.layer is None, e.layer or 0, e.module)),
        run=facts,
        calibration=calibration,
        load_proofs=planned_proofs(plan),
    )


def calibration_facts(rows: Rows, found: Calibrated) -> CalibrationFacts:
    """What a walk read and found, for the record."""
    count, length = rows.ids.shape
    return CalibrationFacts(
        text=rows.text,
        text_sha256=rows.text_sha256,
        ids_sha256=rows.ids_sha256,
        rows=count,
        length=length,
        images=len(rows.pictures.places) if rows.pictures else 0,
        images_sha256=rows.pictures.sha256 if rows.pictures else None,
        left_out=dict(rows.left_out),
        lost_rows=found.lost_rows,
        reports=found.reports,
    )


def pruning_facts(plan: Plan, remarks: Mapping[str, dict[str, Any]]) -> PruningFacts | None:
    """Which experts went, from what a walk put down layer by layer; None where the recipe prunes none."""
    settings = plan.recipe.prune
    if settings is None or not isinstance(plan.source, Pruned):
        return None
    found = [PrunedLayer.model_validate(data) for key, data in remarks.items() if key.startswith(PRUNED)]
    layers = sorted(found, key=lambda layer: (layer.component == "mtp", layer.layer))
    return PruningFacts(
        criterion=settings.criterion,
        before=plan.source.before,
        after=plan.source.count,
        top_k=read_geometry(plan.source.config).chosen,
        layers=layers,
        warnings=[warning for layer in layers if (warning := coverage_warning(layer, settings.least_tokens))],
    )


def coverage_warning(layer: PrunedLayer, least: int) -> str:
    """The experts of a layer that calibration barely reached, and what became of them; nothing where there are none."""
    few = [expert for expert, tokens in enumerate(layer.tokens) if tokens < least]
    if not few:
        return ""
    stayed = [expert for expert in few if expert in layer.kept]
    never = [expert for expert in few if not layer.tokens[expert]]
    return (
        f"{layer.label}: fewer than {least} calibration tokens reached experts {few}"
        + (f", none reached {never}" if never else "")
        + (f"; {stayed} of them stayed" if stayed else "; none of them stayed")
    )


def place_facts(place: Place) -> PlaceFacts:
    """Where a run computed, for its record."""
    device, compute = place.says
    return {"device": device, "compute": compute, "peak_vram": peak_vram(place)}


def source_facts(source: TensorSource, map: ModelMap, located: Located) -> SourceFacts:
    return SourceFacts(
        name=located.name,
        revision=located.revision,
        model_type=map.model_type,
        layout="conditional generation" if "language_model" in map.prefix else "text only",
        parameters=sum(math.prod(t.shape) for t in source.tensors.values()),
        tensors=len(source.tensors),
        bytes=sum(t.nbytes for t in source.tensors.values()),
        license=licence_of(source.folder),
    )


def licence_of(folder: Path) -> str | None:
    """The licence that the model card in a folder states, if any."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        data: Any = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return None
    stated = data.get("license") if isinstance(data, dict) else None
    return str(stated) if stated else None
