"""The driver: finds the models, calls the steps, keeps the record. Thin on purpose: every line of work lives in a step."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from qwench.checkpoint.hub import locate
from qwench.checkpoint.source import StoredSource
from qwench.checkpoint.staging import check_output
from qwench.checkpoint.writer import CheckpointWriter
from qwench.display import Report
from qwench.machine import peak_rss
from qwench.models import map_of
from qwench.models.place import CPU, Place
from qwench.recipe import Recipe
from qwench.result import FILE_NAME, CalibrationFacts, Result, RunFacts
from qwench.steps.calibrate import calibrate, rows_for, split_jobs
from qwench.steps.gguf.plan import GgufRelease, make_gguf_plan
from qwench.steps.gguf.run import make_release
from qwench.steps.heads.gate import unfinished_release
from qwench.steps.heads.watch import watch_head
from qwench.steps.materials.material import Material, material_for_plan, open_material
from qwench.steps.planning.jobs import Job
from qwench.steps.planning.plan import Plan, make_plan
from qwench.steps.planning.readers import reader_notes
from qwench.steps.provenance import Origin, seal
from qwench.steps.quantize import do_jobs, errors_of
from qwench.steps.record import calibration_facts, first_record, place_facts, pruning_facts
from qwench.stream.rows import Rows

WALK_BYTES = 4 * 2 + 4
"""Bytes for each number of the hidden states that may lie on the disk at once: two streams before and after a layer in bfloat16, and in float32 what lies between
its halves."""


def plan_for(recipe: Recipe, model: str, donor: str | None = None) -> Plan | GgufRelease:
    """The plan of a recipe on a model, from names and shapes alone; `donor` in place of the recipe's."""
    source = material_for_plan(recipe, model, donor)
    made: Plan | GgufRelease
    if recipe.gguf:
        made = make_gguf_plan(recipe, source, map_of(source), _name_of(model))
    else:
        made = make_plan(recipe, source, map_of(source))
    readers = reader_notes(made) if isinstance(made, Plan) else []
    return replace(made, notes=(*source.notes, *made.notes, *readers))


def _name_of(model: str) -> str:
    """What a model is called: its hub id, or the name of its folder."""
    place = Path(model).expanduser()
    return locate(model, weights=False).name if place.exists() else model


def run_recipe(
    recipe: Recipe, model: str, out: Path, threads: int = 0, report: Report | None = None, donor: str | None = None,
    accept_any: bool = False, place: Place = CPU,
) -> Result:  # fmt: skip
    """Make a release: plan, write, measure its MTP head, record.

    Args:
        model: a folder, or a hub id.
        out: must not exist yet, be empty, or hold what an earlier run of the same recipe left unfinished.
        threads: of torch; 0 leaves them as they are.
        report: what long work tells; without it a line every ten seconds on stderr.
        donor: a folder or a hub id, in place of the recipe's.
        accept_any: finish it whatever its head is worth.
        place: where layers run, and in which numbers.

    Raises:
        UserError: anything that the user can mend, before any work wherever it can be known before.
        KeyboardInterrupt: what is finished stays for the next run.
    """
    started, began = time.monotonic(), datetime.now(UTC)
    report = report or Report(recipe.name, "bytes", None)
    if threads:
        torch.set_num_threads(threads)
    check_output(out, 0)
    material = open_material(recipe, model, donor)
    source, located = material.source, material.located
    origin = Origin(recipe, located, material.donor_located, accept_any, began)
    if recipe.gguf:
        files = make_gguf_plan(recipe, source, map_of(source), located.name)
        observed = rows_for(recipe, located.path) if recipe.calibrated else None
        watch = watch_head(material, changed=True, accept_any=accept_any, place=place)
        return make_release(files, watch, out, observed, report, started, origin)
    plan = make_plan(recipe, source, map_of(source))
    rows = rows_for(recipe, located.path) if recipe.calibrated else None
    watch = watch_head(material, changed=plan.changed, accept_any=accept_any, place=place)
    fingerprint = plan.fingerprint + source.stamp() + (rows.digest + place.says[1] if rows else "")
    with CheckpointWriter(out, plan.files, fingerprint, _other_bytes(plan, material, rows)) as writer:
        for note in (*source.notes, *writer.notes, *watch.notes):
            report.note(note)
        resumed = len(writer.done)
        grafted = watch.graft(writer, _layers(plan, report))
        calibration = _do(plan, source, writer, rows, report, place)
        pruning = pruning_facts(plan, writer.remarks)
        for warning in pruning.warnings if pruning else ():
            report.note(warning)
        acceptance = watch.release(writer, unfinished_release(writer, plan.config), tell=_layers(plan, report))
        facts = RunFacts(
            seconds=time.monotonic() - started,
            peak_rss=peak_rss(),
            threads=torch.get_num_threads(),
            resumed_tensors=resumed,
            **place_facts(place),
        )
        result = first_record(plan, material, errors_of(writer), facts, calibration)
        result.graft, result.pruning, result.acceptance = grafted, pruning, acceptance
        writer.commit(_sidecars(plan, material, result), lambda folder: seal(folder, origin, result))
    return result


def _layers(plan: Plan, report: Report) -> Callable[[int, int, str], None]:
    """Tells of layers in the bytes that the bar counts."""
    total = plan.nbytes
    return lambda done, layers, what: report(total * done // layers, total, what)


def _do(
    plan: Plan, source: StoredSource, writer: CheckpointWriter, rows: Rows | None, report: Report, place: Place
) -> CalibrationFacts | None:
    """Everything that the plan asks for; decoder layers by a walk where the recipe reads rows."""
    if rows is None:
        do_jobs(plan.jobs, source, writer, _counter(plan, report))
        return None
    outside, layers = split_jobs(plan)
    inside, total = sum(job.nbytes for jobs in layers.values() for job in jobs), plan.nbytes
    found = calibrate(
        plan, source, writer, rows, lambda done, count, what: report(inside * done // count, total, what), place=place
    )
    for layer, row in found.lost_rows:
        report.note(f"calibration row {row} is not finite after layer {layer}: it was left out from there on")
    do_jobs(outside, source, writer, _counter(plan, report, inside))
    return calibration_facts(rows, found)


def _other_bytes(plan: Plan, material: Material, rows: Rows | None) -> int:
    """Bytes that go to the output's disk besides tensors: the other files, and a walk's hidden states while it runs."""
    sidecars = sum(path.stat().st_size for path in material.sidecars.values())
    width = plan.map.other("embed").shape[1]
    pictures = 4 * width * rows.pictures.tokens if rows and rows.pictures else 0
    return sidecars + (0 if rows is None else WALK_BYTES * rows.ids.numel() * width) + pictures


def _counter(plan: Plan, report: Report, done: int = 0) -> Callable[[Job], None]:
    """A function that counts finished jobs by their bytes, from any thread; `done` are those of a walk before."""
    lock, total = threading.Lock(), plan.nbytes

    def count(job: Job) -> None:
        nonlocal done
        with lock:
            done += job.nbytes
            report(done, total, job.outputs[0].name)

    return count


def _sidecars(plan: Plan, material: Material, result: Result) -> dict[str, bytes | Path]:
    config = json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n"
    record = result.model_dump_json(indent=1) + "\n"
    return {**material.sidecars, **plan.sidecars, "config.json": config.encode(), FILE_NAME: record.encode()}
