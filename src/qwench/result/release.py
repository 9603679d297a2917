"""The whole record of a release, and its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from qwench import __version__
from qwench.errors import CheckpointError
from qwench.result.changed import GraftFacts, PruningFacts
from qwench.result.loaded import LoadProof, Verification
from qwench.result.made import CalibrationFacts, PrecisionRow, RunFacts, SourceFacts, TensorError
from qwench.result.measured import AcceptanceCheck, Evaluation, TaskScore
from qwench.result.record import Record

FILE_NAME = "result.json"


class FileFact(Record):
    """A file of the release, and where it is a network by itself (GGUF), what was measured on it.

    Attributes:
        content: of a GGUF file: `model`, `trunk`, `mtp`, `vision`, `importance`.
        file_type: its mix: `Q4_K_M`.
        bits_per_weight: of its tensors, all of them.
        precision: its tensors by component and type.
        notes: fallbacks, and what importance did not reach.
        acceptance: what the run measured of its MTP head.
        evaluation: against the source.
    """

    name: str
    bytes: int
    content: str | None = None
    file_type: str | None = None
    bits_per_weight: float | None = None
    precision: list[PrecisionRow] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    acceptance: AcceptanceCheck | None = None
    evaluation: Evaluation | None = None


class Result(Record):
    qwench: str = __version__
    recipe: dict[str, Any]
    source: SourceFacts
    files: list[FileFact]
    precision: list[PrecisionRow]
    errors: list[TensorError]
    run: RunFacts
    calibration: CalibrationFacts | None = None
    graft: GraftFacts | None = None
    pruning: PruningFacts | None = None
    acceptance: AcceptanceCheck | None = None
    evaluation: Evaluation | None = None
    verifications: list[Verification] = Field(default_factory=list)
    tasks: list[TaskScore] = Field(default_factory=list)
    load_proofs: list[LoadProof] = Field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files)


def read_result(folder: Path) -> Result:
    """The record of a release folder. Raises CheckpointError where there is none or it is not ours."""
    path = folder / FILE_NAME
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {FILE_NAME}", "give the folder of a release that `qwench run` made") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not a record of this version: {error}", "make the release again") from None


def write_result(folder: Path, result: Result) -> None:
    """Replace the record in one move."""
    beside = folder / (FILE_NAME + ".new")
    beside.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    beside.replace(folder / FILE_NAME)


def revise_result(folder: Path, change: Callable[[Result], None]) -> None:
    """Change the record of a folder, where it has one."""
    if (folder / FILE_NAME).is_file():
        result = read_result(folder)
        change(result)
        write_result(folder, result)
