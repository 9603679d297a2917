"""What a run made, from what, and what it took."""

from __future__ import annotations

from pydantic import Field

from qwench.result.record import Record


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
    """What the run that finished took.

    Attributes:
        resumed_tensors: that an earlier, unfinished run had written.
        device, compute: where layers ran, and in which numbers.
        peak_vram: GPU memory held at most; None without a GPU.
    """

    seconds: float
    peak_rss: int
    threads: int
    resumed_tensors: int = 0
    device: str = "cpu"
    compute: str = "float32"
    peak_vram: int | None = None


class CalibrationFacts(Record):
    """What a calibrated run read and what its methods said.

    Attributes:
        images: in the rows; `images_sha256` is over their bytes and places.
        left_out: records that gave no row, or no images, counted by reason.
        lost_rows: rows that were left out because their hidden states were not finite: (layer, row).
        reports: what each method said of each set of weights, by its name; fallbacks are among them.
    """

    text: str
    text_sha256: str
    ids_sha256: str
    rows: int
    length: int
    images: int = 0
    images_sha256: str | None = None
    left_out: dict[str, int] = Field(default_factory=dict)
    lost_rows: list[tuple[int, int]] = Field(default_factory=list)
    reports: dict[str, str] = Field(default_factory=dict)
