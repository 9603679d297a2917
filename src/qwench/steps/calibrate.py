"""Calibrated recipes: the jobs of decoder layers are done by one walk over the rows, everything else as in an uncalibrated run.

The MTP head is the walk's last layer where a calibrated method quantizes weights of it; otherwise it is part of everything else.

The plan is the same, names, shapes and files: only where the numbers come from differs. A layer that the walk has finished is put down tensor by tensor; a weight that
smoothing changed without quantizing it is written in its stored dtype; what nothing touched is copied bit for bit.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from qwench.checkpoint.source import TORCH_DTYPE, StoredSource
from qwench.checkpoint.writer import CheckpointWriter
from qwench.errors import CheckpointError
from qwench.models.map import Slot
from qwench.models.place import CPU, Place
from qwench.models.pruned import Pruned
from qwench.recipe import Recipe
from qwench.steps.changes import ActivationRanges, Pruning, Rounding, Smoothing, Tuning
from qwench.steps.planning.jobs import Job
from qwench.steps.planning.plan import Plan
from qwench.steps.quantize import stored_chunks, write_quantized
from qwench.stream.calibration import calibration_rows
from qwench.stream.hidden import HiddenFiles
from qwench.stream.live import LiveBlock
from qwench.stream.observe import Reach
from qwench.stream.rows import Rows
from qwench.stream.walk import Change, Tell, Walk, walk

MTP = "mtp."
REPORT = "report "
"""What the keys of remarks about methods begin with."""
PRUNED = "pruned "
"""What the keys of remarks about the experts of a layer begin with."""


@dataclass
class Calibrated:
    """What a walk found out.

    Attributes:
        reports: what each method said of each set, by its name.
        lost_rows: rows that turned non-finite: (layer that made them so, row); the MTP head counts as the layer behind the last.
    """

    reports: dict[str, str] = field(default_factory=dict)
    lost_rows: list[tuple[int, int]] = field(default_factory=list)


def rows_for(recipe: Recipe, folder: Path) -> Rows:
    """The calibration rows of a recipe, in the tokens of the checkpoint in `folder`. Raises TextError."""
    assert recipe.calibration is not None
    return calibration_rows(folder, **recipe.calibration.model_dump(exclude={"experts"}))


def reach_of(recipe: Recipe) -> Reach:
    """Which tokens the statistics of an expert are gathered on."""
    return recipe.calibration.experts if recipe.calibration else "routed"


def onward_of(recipe: Recipe) -> Literal["changed", "original"]:
    """Which rows go through the network. Where nothing looks at what the changed layers put out (pruning ranks on the original network, rounding to nearest reads no rows), one stream is
    enough, and half of the work."""
    repaired = recipe.prune is not None and recipe.prune.repair != "none"
    read = recipe.smooth or recipe.correct or (recipe.quantize and recipe.quantize.reads_rows)
    return "changed" if repaired or read or not recipe.prune else "original"


def walks_head(plan: Plan) -> bool:
    """Whether the walk goes on into the MTP head: a method that reads rows, or smoothing, changes weights of it, its experts are pruned, or the range of what its weights read is to be found."""
    recipe = plan.recipe
    if plan.map.mtp and recipe.prune:
        return True
    smoothed = recipe.smooth is not None and any(fold.startswith(MTP) for fold in recipe.smooth.folds)
    tuned = recipe.quantize is not None and recipe.quantize.method != "rtn"
    found = (plan.schemes.get(slot.module) for slot in plan.map.slots() if slot.role.startswith(MTP))
    return bool(plan.map.mtp) and (smoothed or any(s is not None and (tuned or s.activations == "nvfp4") for s in found))


def split_jobs(plan: Plan) -> tuple[list[Job], dict[int, list[Job]]]:
    """Jobs outside of the walk, and those of each of its layers; the MTP head, fc included, counts as the layer behind the last."""
    layer_of = {slot.tensor: block.index for block in plan.map.blocks for slot in block.slots}
    if walks_head(plan):
        head = (*(slot for block in plan.map.mtp for slot in block.slots), plan.map.other("mtp.fc"))
        layer_of |= dict.fromkeys((slot.tensor for slot in head), len(plan.map.blocks))
    outside: list[Job] = []
    layers: dict[int, list[Job]] = defaultdict(list)
    for job in plan.jobs:
        tensor = job.copied.name if job.copied else job.quantized.slots[0].tensor if job.quantized else ""
        (layers[layer_of[tensor]] if tensor in layer_of else outside).append(job)
    return outside, dict(layers)


def changes_of(recipe: Recipe, plan: Plan) -> list[Change]:
    """The recipe's calibrated steps, in order."""
    changes: list[Change] = []
    if recipe.prune and isinstance(plan.source, Pruned):
        changes.append(Pruning(recipe.prune, plan.source, plan.map))
    if recipe.smooth:
        changes.append(Smoothing(recipe.smooth, plan.schemes, plan.source))
    if recipe.quantize:
        tuned = recipe.quantize.method == "autoround"
        changes.append((Tuning if tuned else Rounding)(recipe.quantize, recipe.correct, plan.schemes))
        if any(scheme.activations != "none" for scheme in plan.schemes.values()):
            changes.append(ActivationRanges(recipe.quantize.activations, plan.schemes))
    return changes


def calibrate(
    plan: Plan, source: StoredSource, writer: CheckpointWriter, rows: Rows, tell: Tell, batch: int = 4, place: Place = CPU
) -> Calibrated:
    """Walk the rows through the network and write its decoder layers.

    Args:
        source: what the plan was made from, experts that are pruned included.

    Raises:
        CheckpointError: from the source; or the hidden states of more than a tenth of the rows are not finite.
        OutputError: from the disk.
    """
    _, layers = split_jobs(plan)
    width = plan.map.other("embed").shape[1]
    depth = len(plan.map.blocks)
    files = HiddenFiles(writer.scratch, (*rows.ids.shape, width), torch.bfloat16, depth)
    settings = Walk(
        changes_of(plan.recipe, plan),
        mtp=walks_head(plan),
        onward=onward_of(plan.recipe),
        batch=batch,
        place=place,
        reach=reach_of(plan.recipe),
    )
    _forget_what_is_not_proved(files, settings, layers, writer)
    whole, map, stored = (s.whole, s.whole_map, s) if isinstance(s := plan.source, Pruned) else (source, plan.map, source)

    def emit(live: LiveBlock) -> None:
        for change in settings.changes:
            for key, says in getattr(change, "reports", {}).items():
                if REPORT + key not in writer.remarks:
                    writer.remark(REPORT + key, {"says": says})
            if isinstance(change, Pruning):
                writer.remark(PRUNED + live.label, change.found[live.label].model_dump())
        for job in layers[depth if live.block.component == "mtp" else live.block.index]:
            write_job(job, live, stored, writer)

    walk(settings, whole, map, rows.ids, files, emit, tell, rows.pictures)
    reports = {key.removeprefix(REPORT): str(data["says"]) for key, data in writer.remarks.items() if key.startswith(REPORT)}
    return Calibrated(reports, settings.lost)


def _forget_what_is_not_proved(
    files: HiddenFiles, settings: Walk, layers: Mapping[int, Sequence[Job]], writer: CheckpointWriter
) -> None:
    """A walk goes on only where every layer before it is whole on the disk; otherwise it starts again."""
    latest = files.latest(settings.streams)
    if latest is None:
        return
    before = [o.name for index in range(latest) for job in layers.get(index, ()) for o in job.written]
    if not all(name in writer.done for name in before):
        shutil.rmtree(files.folder)
        files.folder.mkdir()


def write_job(job: Job, live: LiveBlock, source: StoredSource, writer: CheckpointWriter) -> None:
    """Put down one job's tensors from a finished layer."""
    if job.quantized:
        for slot in job.quantized.slots:
            error = live.quantized[slot.module].error
            _check_finite(slot.module, live, error is not None and math.isfinite(error.max_abs))
            write_quantized(slot, job.quantized.scheme, live.quantized[slot.module], job.format, writer)
    elif job.copied:
        slots = [s for s in live.block.slots if s.tensor == job.copied.name]
        if any(s.module in live.altered for s in slots):
            altered = stored_form(live, slots).to("cpu", TORCH_DTYPE[job.outputs[0].dtype])
            _check_finite(job.copied.name, live, bool(altered.isfinite().all()))
            writer.write(job.copied.name, altered)
        else:
            writer.put(job.copied.name, stored_chunks(source, job.copied, job.outputs[0].dtype))


def _check_finite(name: str, live: LiveBlock, finite: bool) -> None:
    """Nothing that is NaN or infinite goes into a release."""
    if not finite:
        raise CheckpointError(
            f"{name}: what {live.label} would store is NaN or infinite, though the checkpoint's own weight is not",
            "keep this role, or leave it out of smoothing: its values are too large for the dtype",
        )


def stored_form(live: LiveBlock, slots: Sequence[Slot]) -> torch.Tensor:
    """The weights of one stored tensor as the layer has them now: a whole parameter, one expert's matrix, or all experts fused."""
    if slots[0].part:
        return live.weights[live.parameter(slots[0])[0]]
    return live.weight(slots[0])
