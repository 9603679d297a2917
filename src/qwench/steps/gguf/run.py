"""Making a GGUF release: rows are observed where the recipe wants importance, files are written one after the other, and the folder appears when all are whole.

A run that was stopped, by Ctrl-C, a full disk or `kill -9`, goes on with the same command: files that were finished are compared with their check sums and kept, the
unfinished one is written again. In memory is one tensor, or some thousand rows of one; encoding uses all threads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from qwench.checkpoint.whole_files import WholeFiles, crc_of
from qwench.display import Report
from qwench.errors import VerificationError
from qwench.formats.gguf import plan_gguf
from qwench.formats.gguf_importance import Importance, importance_of, read_importance, write_importance
from qwench.formats.gguf_source import GgufSource
from qwench.formats.gguf_writer import write_gguf
from qwench.machine import peak_rss
from qwench.models import survey
from qwench.models.place import Place
from qwench.numerics.ggml_native import library
from qwench.recipe.shared import public_data
from qwench.result import FILE_NAME, AcceptanceCheck, CalibrationFacts, FileFact, Result, RunFacts
from qwench.steps.calibrate import Calibrated
from qwench.steps.cards.card import FILE_NAME as CARD
from qwench.steps.gguf.card import card_text
from qwench.steps.gguf.plan import IMPORTANCE, GgufRelease, PlannedFile
from qwench.steps.gguf.table import precision_rows
from qwench.steps.heads.gate import first_position
from qwench.steps.heads.watch import HeadWatch
from qwench.steps.materials.material import Material
from qwench.steps.provenance import Origin, seal
from qwench.steps.record import calibration_facts, place_facts, source_facts
from qwench.stream.importance import importance_walk
from qwench.stream.rows import Rows

Checks = Mapping[str, AcceptanceCheck | None]
"""By file: what was measured of its head."""
OBSERVED = "importance"
"""Key of the remark with what the walk over the rows said."""


def make_release(
    plan: GgufRelease, watch: HeadWatch, out: Path, rows: Rows | None, report: Report, started: float, origin: Origin
) -> Result:
    """Write every file of the plan, look after its MTP head, and write the record.

    Args:
        plan: what the release is.
        watch: over the head, with all that the run reads, and where the network is run.
        out: the folder that is to appear.
        rows: calibration rows where the recipe wants importance.
        report: hears of progress, in bytes.
        started: `time.monotonic()` at the start of the command.
        origin: where all of it comes from, for its provenance.

    Raises:
        CheckpointError: a weight cannot be read or is not finite, or a file that the metadata is made from is missing.
        OutputError: the folder is taken, or the disk is full.
        VerificationError: the head of a file lost more acceptance than the recipe allows.
    """
    material = watch.material
    sizes: dict[str, int | None] = {IMPORTANCE: None} if plan.export.importance else {}
    sizes |= {file.name: file.nbytes for file in plan.files}
    fingerprint = plan.fingerprint + material.source.stamp() + (rows.digest if rows is not None else "")
    with WholeFiles(out, sizes, fingerprint, _other_bytes(plan, material, rows)) as files:
        for note in (*material.source.notes, *files.notes, *plan.notes, *watch.notes):
            report.note(note)
        kept, progress = len(files.done), _Progress(plan, report)
        grafted = watch.graft(files, progress.layers)
        importance = _importance(plan, rows, files, progress, watch.place)
        for file in plan.files:
            _write(file, plan, files, importance, progress)
        checks = {file.name: _checked(file, plan, watch, files, progress) for file in plan.files if _drafts(file)}
        facts = RunFacts(
            seconds=time.monotonic() - started, peak_rss=peak_rss(), threads=torch.get_num_threads(), resumed_tensors=kept,
            **place_facts(watch.place),
        )  # fmt: skip
        result = _record(plan, material, rows, files, facts, checks)
        result.graft = grafted
        files.commit(_sidecars(plan, material, result, out.resolve().name), lambda folder: seal(folder, origin, result))
    return result


class _Progress:
    """Bytes of all files, and layers of whatever reads the network between them."""

    def __init__(self, plan: GgufRelease, report: Report) -> None:
        self.total, self.done, self.report = sum(file.plan.tensor_bytes for file in plan.files), 0, report

    def count(self, nbytes: int, what: str) -> None:
        self.done += nbytes
        self.report(self.done, self.total, what)

    def layers(self, done: int, layers: int, what: str) -> None:
        self.report(self.done, self.total, f"{what}: layer {done} of {layers}")


def _drafts(file: PlannedFile) -> bool:
    return file.plan.content == "model" and file.plan.map.has_mtp


def _checked(
    file: PlannedFile, plan: GgufRelease, watch: HeadWatch, files: WholeFiles, progress: _Progress
) -> AcceptanceCheck | None:
    """The head of a finished file, its bytes read back. Raises VerificationError."""
    written = GgufSource(files.path(file.name), plan.source.config)
    try:
        return watch.release(files, written, key=file.name, tell=progress.layers)
    except VerificationError as error:
        raise VerificationError(f"{file.name}: {error.what}", error.mend) from None


def _write(file: PlannedFile, plan: GgufRelease, files: WholeFiles, importance: Importance | None, progress: _Progress) -> None:
    """One file, unless an earlier run wrote it."""
    if file.name in files.done:
        progress.count(file.plan.tensor_bytes, file.name)
        return
    used = importance if file.plan.content != "vision" else None
    for note in used.check(file.plan) if used else ():
        progress.report.note(f"{file.name}: {note}")
        files.remark(f"note {file.name}: {note}", {"file": file.name, "says": note})
    written = write_gguf(
        file.plan, plan.source, files.path(file.name), importance=used, progress=lambda n, _: progress.count(n, file.name)
    )
    files.finished(file.name, written.crc32)


def _importance(
    plan: GgufRelease, rows: Rows | None, files: WholeFiles, progress: _Progress, place: Place
) -> Importance | None:
    """The importance of every tensor, from its file in the release, which is made where no earlier run did; None where the recipe wants none."""
    if not plan.export.importance:
        return None
    path = files.path(IMPORTANCE)
    if IMPORTANCE not in files.done:
        write_importance(path, plan.importance or _observed(plan, rows, files, progress, place))
        files.finished(IMPORTANCE, crc_of(path))
    return read_importance(path)


def _observed(plan: GgufRelease, rows: Rows | None, files: WholeFiles, progress: _Progress, place: Place) -> Importance:
    """From a walk over the rows."""
    assert rows is not None
    lost: list[tuple[int, int]] = []
    files.scratch.mkdir(exist_ok=True)
    squares = importance_walk(
        plan.source, plan.map, rows.ids, folder=files.scratch, tell=progress.layers, place=place, pictures=rows.pictures,
        lost=lambda layer, row: lost.append((layer, row)),
    )  # fmt: skip
    whole = plan_gguf(plan.source, plan.map, name=plan.name)
    files.remark(OBSERVED, {"lost_rows": lost})
    return importance_of(whole, squares, texts=[rows.text], length=rows.length, rows=len(rows.ids))


def _record(
    plan: GgufRelease, material: Material, rows: Rows | None, files: WholeFiles, facts: RunFacts, checks: Checks
) -> Result:
    described = [
        FileFact(
            name=file.name, bytes=files.path(file.name).stat().st_size, content=file.plan.content, file_type=file.plan.file_type,
            bits_per_weight=file.plan.bits_per_weight, precision=precision_rows(file.plan), notes=list(file.plan.notes),
            acceptance=checks.get(file.name),
        )
        for file in plan.files
    ]  # fmt: skip
    if plan.export.importance:
        described.append(FileFact(name=IMPORTANCE, bytes=files.path(IMPORTANCE).stat().st_size, content="importance"))
    for remark in files.remarks.values():
        if "file" in remark:
            next(f for f in described if f.name == remark["file"]).notes.append(str(remark["says"]))
    return Result(
        recipe=public_data(plan.recipe),
        source=source_facts(material.origin, survey(material.origin).map, material.located),
        files=described,
        precision=[],
        errors=[],
        run=facts,
        calibration=_calibration(rows, files) if rows is not None else None,
        acceptance=min((c for c in checks.values() if c), key=lambda c: first_position(c.release), default=None),
    )


def _calibration(rows: Rows, files: WholeFiles) -> CalibrationFacts:
    lost = [(layer, row) for layer, row in files.remarks[OBSERVED]["lost_rows"]]
    return calibration_facts(rows, Calibrated({"quantizer": "llama.cpp's own" if library() is not None else "ours"}, lost))


def _sidecars(plan: GgufRelease, material: Material, result: Result, title: str) -> dict[str, bytes | Path]:
    """What lies beside the files: config and tokenizer, by which the release can be read under the checkpoint's names; the record; the card."""
    config = json.dumps(plan.source.config, indent=2, ensure_ascii=False) + "\n"
    record = result.model_dump_json(indent=1) + "\n"
    own = {"config.json": config.encode(), FILE_NAME: record.encode(), CARD: card_text(result, title).encode()}
    return {**material.sidecars, **own}


def _other_bytes(plan: GgufRelease, material: Material, rows: Rows | None) -> int:
    """Bytes that go to the output's disk besides the planned files: sidecars, and while rows are observed, importance and hidden states."""
    sidecars = sum(path.stat().st_size for path in material.sidecars.values())
    if rows is None:
        return sidecars
    importance = sum(4 * (slot.shape[-1] + 1) for slot in plan.map.slots() if slot.linear)
    width = plan.map.other("embed").shape[1]
    pictures = 4 * width * rows.pictures.tokens if rows.pictures else 0
    return sidecars + importance + rows.ids.numel() * width * 4 + pictures
