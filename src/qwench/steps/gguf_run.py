"""Making a GGUF release: rows are observed where the recipe wants importance, files are written one after the other, and the folder appears when all are whole.

A run that was stopped, by Ctrl-C, a full disk or `kill -9`, goes on with the same command: files that were finished are compared with their check sums and kept, the
unfinished one is written again. In memory is one tensor, or some thousand rows of one; encoding uses all threads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qwench.checkpoint.hub import Located
from qwench.checkpoint.sidecars import sidecars_of
from qwench.checkpoint.whole_files import WholeFiles, crc_of
from qwench.display import Report
from qwench.formats.gguf import plan_gguf
from qwench.formats.gguf_importance import Importance, importance_of, read_importance, write_importance
from qwench.formats.gguf_writer import write_gguf
from qwench.machine import peak_rss
from qwench.numerics.ggml_native import library
from qwench.result import FILE_NAME, CalibrationFacts, FileFact, Result, RunFacts
from qwench.steps.card import FILE_NAME as CARD
from qwench.steps.gguf_card import card_text
from qwench.steps.gguf_plan import IMPORTANCE, GgufRelease, PlannedFile
from qwench.steps.gguf_table import precision_rows
from qwench.steps.record import source_facts
from qwench.stream.importance import importance_walk
from qwench.stream.rows import Rows

OBSERVED = "importance"
"""Key of the remark with what the walk over the rows said."""


def make_release(
    plan: GgufRelease, located: Located, out: Path, rows: Rows | None, stamp: str, report: Report, started: float
) -> Result:
    """Write every file of the plan, and the record.

    Args:
        plan: what the release is.
        located: where the source came from.
        out: the folder that is to appear.
        rows: calibration rows where the recipe wants importance.
        stamp: of the source's files; a run whose source changed starts clean.
        report: hears of progress, in bytes.
        started: `time.monotonic()` at the start of the command.

    Raises:
        CheckpointError: a weight cannot be read or is not finite, or a file that the metadata is made from is missing.
        OutputError: the folder is taken, or the disk is full.
    """
    sizes: dict[str, int | None] = {IMPORTANCE: None} if rows is not None else {}
    sizes |= {file.name: file.nbytes for file in plan.files}
    fingerprint = plan.fingerprint + stamp + (rows.ids_sha256 if rows is not None else "")
    with WholeFiles(out, sizes, fingerprint, _other_bytes(plan, rows)) as files:
        for note in (*files.notes, *plan.notes):
            report.note(note)
        kept = len(files.done)
        importance = _importance(plan, rows, files, report) if rows is not None else None
        count = _counter(plan, report)
        for file in plan.files:
            _write(file, plan, files, importance, count, report)
        facts = RunFacts(
            seconds=time.monotonic() - started, peak_rss=peak_rss(), threads=torch.get_num_threads(), resumed_tensors=kept
        )
        result = _record(plan, located, rows, files, facts)
        files.commit(_sidecars(plan, result, out.resolve().name))
    return result


def _write(
    file: PlannedFile, plan: GgufRelease, files: WholeFiles, importance: Importance | None, count: Callable[[int, str], None], report: Report
) -> None:  # fmt: skip
    """One file, unless an earlier run wrote it."""
    if file.name in files.done:
        count(file.plan.tensor_bytes, file.name)
        return
    used = importance if file.plan.content != "vision" else None
    for note in used.check(file.plan) if used else ():
        report.note(f"{file.name}: {note}")
        files.remark(f"note {file.name}: {note}", {"file": file.name, "says": note})
    written = write_gguf(
        file.plan, plan.source, files.path(file.name), importance=used, progress=lambda n, _: count(n, file.name)
    )
    files.finished(file.name, written.crc32)


def _importance(plan: GgufRelease, rows: Rows, files: WholeFiles, report: Report) -> Importance:
    """The importance of every tensor: from an earlier run's file, or from a walk over the rows."""
    path = files.path(IMPORTANCE)
    if IMPORTANCE in files.done:
        return read_importance(path)
    lost: list[tuple[int, int]] = []
    files.scratch.mkdir(exist_ok=True)
    squares = importance_walk(
        plan.source, plan.map, rows.ids, folder=files.scratch, lost=lambda layer, row: lost.append((layer, row)),
        tell=lambda done, layers, what: report(done, layers, f"importance: {what}"),
    )  # fmt: skip
    whole = plan_gguf(plan.source, plan.map, name=plan.name)
    found = importance_of(whole, squares, texts=[rows.text], length=rows.length, rows=len(rows.ids))
    write_importance(path, found)
    files.remark(OBSERVED, {"lost_rows": lost})
    files.finished(IMPORTANCE, crc_of(path))
    return read_importance(path)


def _counter(plan: GgufRelease, report: Report) -> Callable[[int, str], None]:
    total, done = sum(file.plan.tensor_bytes for file in plan.files), 0

    def count(nbytes: int, what: str) -> None:
        nonlocal done
        done += nbytes
        report(done, total, what)

    return count


def _record(plan: GgufRelease, located: Located, rows: Rows | None, files: WholeFiles, facts: RunFacts) -> Result:
    from qwench.recipe import recipe_data

    described = [
        FileFact(
            name=file.name, bytes=files.path(file.name).stat().st_size, content=file.plan.content, file_type=file.plan.file_type,
            bits_per_weight=file.plan.bits_per_weight, precision=precision_rows(file.plan), notes=list(file.plan.notes),
        )
        for file in plan.files
    ]  # fmt: skip
    if rows is not None:
        described.append(FileFact(name=IMPORTANCE, bytes=files.path(IMPORTANCE).stat().st_size, content="importance"))
    for remark in files.remarks.values():
        if "file" in remark:
            next(f for f in described if f.name == remark["file"]).notes.append(str(remark["says"]))
    return Result(
        recipe=recipe_data(plan.recipe), source=source_facts(plan.source, plan.map, located), files=described, precision=[], errors=[],
        run=facts, calibration=_calibration(rows, files) if rows is not None else None,
    )  # fmt: skip


def _calibration(rows: Rows, files: WholeFiles) -> CalibrationFacts:
    count, length = rows.ids.shape
    return CalibrationFacts(
        text=rows.text, text_sha256=rows.text_sha256, ids_sha256=rows.ids_sha256, rows=count, length=length,
        lost_rows=[(layer, row) for layer, row in files.remarks[OBSERVED]["lost_rows"]],
        reports={"quantizer": "llama.cpp's own" if library() is not None else "ours"},
    )  # fmt: skip


def _sidecars(plan: GgufRelease, result: Result, title: str) -> dict[str, bytes | Path]:
    """What lies beside the files: config and tokenizer, by which the release can be read under the checkpoint's names; the record; the card."""
    config = json.dumps(plan.source.config, indent=2, ensure_ascii=False) + "\n"
    record = result.model_dump_json(indent=1) + "\n"
    own = {"config.json": config.encode(), FILE_NAME: record.encode(), CARD: card_text(result, title).encode()}
    return {**sidecars_of(plan.source.folder), **own}


def _other_bytes(plan: GgufRelease, rows: Rows | None) -> int:
    """Bytes that go to the output's disk besides the planned files: sidecars, and while rows are observed, importance and hidden states."""
    sidecars = sum(path.stat().st_size for path in sidecars_of(plan.source.folder).values())
    if rows is None:
        return sidecars
    importance = sum(4 * (slot.shape[-1] + 1) for slot in plan.map.slots() if slot.linear)
    width = plan.map.other("embed").shape[1]
    return sidecars + importance + rows.ids.numel() * width * 4
