"""Measures a finished release and puts what came of it on its record: engines that load it, its figures against the source.

A folder without a record, somebody else's release, is measured all the same.
"""

from __future__ import annotations

from pathlib import Path

from qwench.checkpoint.folder import read_config
from qwench.checkpoint.hub import locate
from qwench.display import Report
from qwench.evaluation.lockstep import Progress
from qwench.formats.gguf_source import GgufSource
from qwench.models.place import CPU, Place
from qwench.result import Evaluation, Result, Verification, revise_result
from qwench.steps.checks.verify import verify
from qwench.steps.gguf.verify import files_to_verify, refuse_other_engines, verify_gguf
from qwench.steps.measures.evaluate import evaluate
from qwench.stream.rows import Rows, held_out_rows, rows_from_text


def verify_release(release: Path, engine: str, adapter: Path | None = None) -> Verification:
    """Load a release in an engine, alone or with an adapter of corrections, and add what came of it to the record.

    What was found with an adapter stands before what was found without, so that readers who want one line per engine take the release alone.
    """
    found = verify(release, engine, adapter=adapter)

    def replace(result: Result) -> None:
        others = [v for v in result.verifications if (v.engine, v.adapter) != (found.engine, found.adapter)]
        result.verifications = sorted([*others, found], key=lambda v: v.adapter is None)

    revise_result(release, replace)
    return found


def verify_gguf_release(release: Path, engine: str, file: str | None, against: str | None) -> list[Verification]:
    """Load every language model of a GGUF release in llama.cpp, or one file, and add what came of it to the record.

    Args:
        against: the checkpoint that it was made from, for comparing unquantized files with transformers; None where it is not at hand.
    """
    refuse_other_engines(release, engine)
    found = verify_gguf(release, file, locate(against).path if against else None)
    names = {v.file for v in found}

    def replace(result: Result) -> None:
        result.verifications = [v for v in result.verifications if v.file not in names] + found

    revise_result(release.parent if release.suffix == ".gguf" else release, replace)
    return found


def evaluate_release(
    release: Path, against: str, text: Path | None = None, documents: int = 16, length: int = 512, report: Report | None = None,
    speculate: int = 0, place: Place = CPU,
) -> Evaluation:  # fmt: skip
    """Measure a release against its source and add the figures to the record; `speculate`: tokens that both write with drafts after each row."""
    read_config(release)
    report = report or _plain()
    rows = _rows(text, release, documents, length)
    measured = evaluate(release, locate(against).path, rows, lambda at: _tell(report, at), place, speculate)

    def replace(result: Result) -> None:
        result.evaluation = measured

    revise_result(release, replace)
    return measured


def evaluate_gguf_release(
    release: Path, against: str, text: Path | None = None, documents: int = 16, length: int = 512, report: Report | None = None,
    only: str | None = None, place: Place = CPU,
) -> dict[str, Evaluation]:  # fmt: skip
    """Measure every language model of a GGUF release against the source, or one file, and add the figures to the record; by file.

    Each file's figures are put down as soon as they are known.
    """
    files, report = files_to_verify(release, only), report or _plain()
    folder, source = files[0].parent, locate(against).path
    config, measured = read_config(folder), dict[str, Evaluation]()
    rows = _rows(text, folder, documents, length)

    def replace(result: Result) -> None:
        for fact in result.files:
            fact.evaluation = measured.get(fact.name, fact.evaluation)

    for opened in [GgufSource(file, config) for file in files]:
        name = opened.file.name
        measured[name] = evaluate(opened, source, rows, lambda at, name=name: _tell(report, at, f"{name}, "), place)  # type: ignore[misc]
        revise_result(folder, replace)
    return measured


def _rows(text: Path | None, tokenizer: Path, documents: int, length: int) -> Rows:
    return rows_from_text(text, tokenizer, documents, length) if text else held_out_rows(tokenizer, documents, length)


def _plain() -> Report:
    """What tells of progress where nobody asked for more: a line every ten seconds on stderr."""
    return Report("evaluation", "blocks", None)


def _tell(report: Report, at: Progress, what: str = "") -> None:
    report(at.block, at.blocks, f"{what}{at.tokens_per_second:.0f} tokens/s")
