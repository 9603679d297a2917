"""The whole record of a release, and its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from qwench import __version__
from qwench.errors import CheckpointError
from qwench.result.changed import GraftFacts, PruningFacts
from qwench.result.loaded import LoadProof, Verification
from qwench.result.made import CalibrationFacts, PrecisionRow, RunFacts, SourceFacts, TensorError
from qwench.result.measured import AcceptanceCheck, Evaluation, TaskScore
from qwench.result.record import NO_UNIT, Bytes, Record, unit

FILE_NAME = "result.json"
FORMAT = 2
"""Of the record. It grows with every release of this package in which a field is added, renamed or means something else; fields that are added have a default, so that older records still read."""


class FileFact(Record):
    """A file of the release, and where it is a network by itself (GGUF), what was measured on it."""

    name: str
    """Its path in the folder."""
    bytes: Bytes
    """Its size."""
    content: str | None = None
    """Of a GGUF file: `model`, `trunk`, `mtp`, `vision`, `importance`."""
    file_type: str | None = None
    """Of a GGUF file, its mix: `Q4_K_M`."""
    bits_per_weight: Annotated[float, unit("bits per parameter")] | None = None
    """Of all its tensors."""
    precision: list[PrecisionRow] = Field(default_factory=list)
    """Its tensors by component and type."""
    notes: list[str] = Field(default_factory=list)
    """Fallbacks, and what importance did not reach."""
    acceptance: AcceptanceCheck | None = None
    """What the run measured of its MTP head."""
    evaluation: Evaluation | None = None
    """Against the source."""


class Result(Record):
    """What a release turned out to be. A number is in here only if it was measured on this very release."""

    format: Annotated[int, unit(NO_UNIT)] = FORMAT
    """Of this record; one without it is of format 1. Older ones are read, newer ones are refused."""
    qwench: str = __version__
    """Version of the package that made the release."""
    recipe: dict[str, Any]
    """The recipe with all its defaults."""
    source: SourceFacts
    """What it was made from."""
    files: list[FileFact]
    """What the run wrote and its sizes; of a GGUF release also what was measured of each."""
    precision: list[PrecisionRow]
    """What is stored how; empty where each file says so itself (GGUF)."""
    errors: list[TensorError]
    """Round-trip error of every quantized weight; empty of a GGUF release."""
    run: RunFacts
    """What the run took."""
    calibration: CalibrationFacts | None = None
    """What it was calibrated on; null where the recipe reads no rows."""
    graft: GraftFacts | None = None
    """What was taken from another checkpoint; null where nothing was."""
    pruning: PruningFacts | None = None
    """Which experts are gone; null where none are."""
    acceptance: AcceptanceCheck | None = None
    """What the run measured of the MTP head; null where there is none, and of a GGUF release."""
    evaluation: Evaluation | None = None
    """Against the source; null where nobody ran `qwench eval`."""
    verifications: list[Verification] = Field(default_factory=list)
    """What engines did with it, the latest of each."""
    tasks: list[TaskScore] = Field(default_factory=list)
    """Benchmarks."""
    load_proofs: list[LoadProof] = Field(default_factory=list)
    """What engines would do with it, told without them."""

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files)


def read_result(folder: Path) -> Result:
    """The record of a release folder, as the present format has it. Raises CheckpointError where there is none, or it is newer than we are, or not ours."""
    path = folder / FILE_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {FILE_NAME}", "give the folder of a release that `qwench run` made") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "fetch the release again, or make it again") from None
    check_format(path, data, FORMAT)
    try:
        return Result.model_validate(data | {"format": FORMAT})
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is not a record of a release: {_said(error)}", "fetch the release again, or make it again"
        ) from None


def check_format(path: Path, data: Any, known: int) -> None:
    """Raise CheckpointError where a file of ours holds no mapping, or says that it is of a later format than we know."""
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no mapping", "fetch the release again, or make it again")
    found = data.get("format", 1)
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(f"{path} says that it is of format {found!r}", "fetch the release again, or make it again")
    if found > known:
        what = f"{path} is of format {found}; Qwench {__version__} reads formats up to {known}"
        raise CheckpointError(what, "install a newer Qwench: pip install -U qwench")


def _said(error: ValidationError) -> str:
    """The first things that do not fit, by their place."""
    found = [f"{'.'.join(map(str, one['loc']))}: {one['msg'][:1].lower()}{one['msg'][1:]}" for one in error.errors()[:3]]
    more = error.error_count() - len(found)
    return "; ".join(found) + (f"; and {more} more" if more > 0 else "")


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
