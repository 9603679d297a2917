"""The record of a release: `result.json` in its folder. Cards, tables and plots are made from it and from nothing else.

Sizes are bytes, times are seconds. A number is in here only if it was measured on this very release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qwench import __version__
from qwench.errors import CheckpointError

FILE_NAME = "result.json"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SourceFacts(Record):
    """The checkpoint that the release was made from."""

    name: str
    revision: str | None = None
    model_type: str
    layout: str
    parameters: int
    tensors: int
    bytes: int
    license: str | None = None


class FileFact(Record):
    name: str
    bytes: int


class PrecisionRow(Record):
    """All weights of one component that are stored alike: `component` is attention, delta, mlp, expert, shared, embed, head, mtp, vision, other.

    `source_bytes` is what the same weights took in the source; None where nobody counted.
    """

    component: str
    stored: str
    tensors: int
    parameters: int
    bytes: int
    source_bytes: int | None = None


class TensorError(Record):
    """Round-trip error of one quantized weight: absolute values, and the root mean square relative to the weight's own."""

    module: str
    role: str
    layer: int | None
    scheme: str
    mean_abs: float
    max_abs: float
    relative_rms: float


class RunFacts(Record):
    seconds: float
    peak_rss: int
    threads: int
    resumed_tensors: int = 0


class CalibrationFacts(Record):
    """What a calibrated run read and what its methods said.

    Attributes:
        lost_rows: rows that were left out because their hidden states were not finite: (layer, row).
        reports: what each method said of each set of weights, by its name; fallbacks are among them.
    """

    text: str
    text_sha256: str
    ids_sha256: str
    rows: int
    length: int
    lost_rows: list[tuple[int, int]] = Field(default_factory=list)
    reports: dict[str, str] = Field(default_factory=dict)


class Estimate(Record):
    """A mean over documents with its standard error."""

    mean: float
    standard_error: float


class Divergence(Record):
    """KL(source || release) per token, nats.

    The histogram has one count fewer than edges; its lowest bin also holds everything below it, zero included.
    """

    mean: Estimate
    p99: float
    p999: float
    max: float
    histogram_edges: list[float] = Field(default_factory=list)
    histogram_counts: list[int] = Field(default_factory=list)


class Acceptance(Record):
    """Share of drafts of the MTP head that its own trunk accepts greedily, by draft position (a position counts only where all before it
    were accepted)."""

    by_position: list[Estimate]


class Evaluation(Record):
    """Source and release on the same rows.

    Attributes:
        text: the name of the text, and the SHA-256 of its file.
        ids_sha256: SHA-256 of the rows' token ids.
        documents, length: rows, and tokens in each.
        tokens: positions that were scored: all but the last of each row.
        loss_increase: negative log-likelihood of the text, release minus source, nats per token. Paired token by token, its standard error is far
            below those of the perplexities, which documents of different difficulty dominate.
        hidden_error_by_layer: after each decoder layer, ||release - source|| / ||source|| over the hidden states of all rows.
        seconds, peak_rss: of the evaluation.
    """

    text: str
    text_sha256: str
    ids_sha256: str = ""
    documents: int
    length: int = 0
    tokens: int
    compute_dtype: str
    divergence: Divergence
    perplexity_source: Estimate
    perplexity_release: Estimate
    top1_agreement: Estimate
    loss_increase: Estimate | None = None
    acceptance_source: Acceptance | None = None
    acceptance_release: Acceptance | None = None
    hidden_error_by_layer: list[float] = Field(default_factory=list)
    seconds: float = 0.0
    peak_rss: int = 0


class Verification(Record):
    """What one engine did with the finished folder.

    Attributes:
        outcome: `agrees`, `loads` (numerics not proved, `notes` says why), `disagrees`, `failed`.
        consumed, unconsumed: tensors of the files that the engine used, and the names of those it did not.
        mean_kl, max_abs_logprob: our reading of the file against the engine's, on `positions` positions.
    """

    engine: str
    version: str
    outcome: str
    consumed: int
    unconsumed: list[str] = Field(default_factory=list)
    uninitialized: list[str] = Field(default_factory=list)
    positions: int = 0
    mean_kl: float | None = None
    max_abs_logprob: float | None = None
    tolerance_kl: float | None = None
    generated: str | None = None
    image: str | None = None
    speculation: dict[str, float] | None = None
    notes: list[str] = Field(default_factory=list)


class Result(Record):
    qwench: str = __version__
    recipe: dict[str, Any]
    source: SourceFacts
    files: list[FileFact]
    precision: list[PrecisionRow]
    errors: list[TensorError]
    run: RunFacts
    calibration: CalibrationFacts | None = None
    evaluation: Evaluation | None = None
    verifications: list[Verification] = Field(default_factory=list)

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
