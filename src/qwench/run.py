"""The driver: finds the models, calls the steps, keeps the record. Thin on purpose: every line of work lives in a step."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qwench.checkpoint.folder import CONFIG_NAME, read_config
from qwench.checkpoint.hub import Located, locate
from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.sidecars import sidecars_of
from qwench.checkpoint.source import TensorSource
from qwench.checkpoint.staging import check_output
from qwench.checkpoint.writer import CheckpointWriter
from qwench.display import Report
from qwench.machine import peak_rss
from qwench.models import map_of, sketch
from qwench.recipe import Recipe
from qwench.result import FILE_NAME, CalibrationFacts, Evaluation, Result, RunFacts, Verification, read_result, write_result
from qwench.steps.calibrate import calibrate, rows_for, split_jobs
from qwench.steps.jobs import Job
from qwench.steps.plan import Plan, make_plan
from qwench.steps.quantize import do_jobs, errors_of
from qwench.steps.record import calibration_facts, first_record
from qwench.stream.rows import Rows

WALK_COPIES = 4
"""Hidden states that may lie on the disk at once: two streams, before and after a layer."""


def shapes_of(model: str) -> TensorSource:
    """What names and shapes a model has: from its headers, or where only its config is at hand (a lone config.json, a hub id), as that describes it."""
    folder = locate(model, weights=False).path
    stored = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    broken = Path(model).exists() and any(folder.glob("*.safetensors.index.json"))
    if stored or broken or not (folder / CONFIG_NAME).is_file():
        return Checkpoint.open(folder)
    return sketch(read_config(folder))


def plan_for(recipe: Recipe, model: str) -> Plan:
    """The plan of a recipe on a model, from names and shapes alone."""
    source = shapes_of(model)
    return make_plan(recipe, source, map_of(source))


def run_recipe(recipe: Recipe, model: str, out: Path, threads: int, report: Report) -> Result:
    """Make a release: plan, write, record.

    Raises:
        UserError: anything that the user can mend, before any work wherever it can be known before.
        KeyboardInterrupt: what is finished stays for the next run.
    """
    started = time.monotonic()
    if threads:
        torch.set_num_threads(threads)
    check_output(out, 0)
    located = locate(model)
    source = Checkpoint.open(located.path)
    plan = make_plan(recipe, source, map_of(source))
    rows = rows_for(recipe, located.path) if recipe.calibrated else None
    fingerprint = plan.fingerprint + source.stamp() + (rows.ids_sha256 if rows else "")
    with CheckpointWriter(out, plan.files, fingerprint, _other_bytes(plan, located, rows)) as writer:
        for note in (*source.notes, *writer.notes):
            report.note(note)
        resumed = len(writer.done)
        calibration = _do(plan, source, writer, rows, report)
        facts = RunFacts(
            seconds=time.monotonic() - started,
            peak_rss=peak_rss(),
            threads=torch.get_num_threads(),
            resumed_tensors=resumed,
        )
        result = first_record(plan, located, errors_of(writer), facts, calibration)
        writer.commit(_sidecars(plan, located, result))
    return result


def _do(plan: Plan, source: Checkpoint, writer: CheckpointWriter, rows: Rows | None, report: Report) -> CalibrationFacts | None:
    """Everything that the plan asks for; decoder layers by a walk where the recipe reads rows."""
    if rows is None:
        do_jobs(plan.jobs, source, writer, _counter(plan, report))
        return None
    outside, _ = split_jobs(plan)
    total = plan.nbytes
    found = calibrate(plan, source, writer, rows, lambda done, layers, what: report(total * done // layers, total, what))
    do_jobs(outside, source, writer, _counter(plan, report))
    return calibration_facts(rows, found)


def _other_bytes(plan: Plan, located: Located, rows: Rows | None) -> int:
    """Bytes that go to the output's disk besides tensors: the other files, and a walk's hidden states while it runs."""
    sidecars = sum(path.stat().st_size for path in sidecars_of(located.path).values())
    width = plan.map.other("embed").shape[1]
    return sidecars + (0 if rows is None else WALK_COPIES * rows.ids.numel() * width * 2)


def _counter(plan: Plan, report: Report) -> Callable[[Job], None]:
    """A function that counts finished jobs by their bytes, from any thread."""
    lock, total, done = threading.Lock(), plan.nbytes, 0

    def count(job: Job) -> None:
        nonlocal done
        with lock:
            done += job.nbytes
            report(done, total, job.outputs[0].name)

    return count


def _sidecars(plan: Plan, located: Located, result: Result) -> dict[str, bytes | Path]:
    config = json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n"
    record = result.model_dump_json(indent=1) + "\n"
    return {**sidecars_of(located.path), **plan.sidecars, "config.json": config.encode(), FILE_NAME: record.encode()}


def verify_release(release: Path, engine: str) -> Verification:
    """Load a release in an engine and add what came of it to the record."""
    from qwench.steps.verify import verify

    found = verify(release, engine)
    if (release / FILE_NAME).is_file():
        result = read_result(release)
        result.verifications = [v for v in result.verifications if v.engine != engine] + [found]
        write_result(release, result)
    return found


def evaluate_release(
    release: Path, against: str, text: Path | None, documents: int, length: int, report: Report, speculate: int = 0
) -> Evaluation:
    """Measure a release against its source and add the figures to the record; `speculate`: tokens that both write with drafts after each row."""
    from qwench.steps.evaluate import evaluate
    from qwench.stream.rows import held_out_rows, rows_from_text

    read_config(release)
    rows = rows_from_text(text, release, documents, length) if text else held_out_rows(release, documents, length)
    measured = evaluate(
        release,
        locate(against).path,
        rows,
        lambda at: report(at.block, at.blocks, f"{at.tokens_per_second:.0f} tokens/s"),
        speculate=speculate,
    )
    if (release / FILE_NAME).is_file():
        result = read_result(release)
        result.evaluation = measured
        write_result(release, result)
    return measured
