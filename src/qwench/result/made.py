"""What a run made, from what, and what it took."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qwench.result.record import Bytes, Number, Ratio, Record, Rows, Seconds, Tensors, Tokens, unit

Parameters = Annotated[int, unit("parameters")]
Weight = Annotated[float, unit("that of the weights")]


class SourceFacts(Record):
    """The checkpoint that the release was made from."""

    name: str
    """Hub id, or the folder that was named."""
    revision: str | None = None
    """Its commit, where it came from the hub."""
    model_type: str
    """As its config.json says it."""
    layout: str
    """`conditional generation` (text under a model with images) or `text only`."""
    parameters: Parameters
    """Of all tensors."""
    tensors: Tensors
    """That it stores."""
    bytes: Bytes
    """Of all tensors."""
    license: str | None = None
    """As its card states it."""


class PrecisionRow(Record):
    """All weights of one component that are stored alike."""

    component: str
    """`attention`, `delta`, `mlp`, `expert`, `shared`, `embed`, `head`, `mtp`, `vision`, `other`."""
    stored: str
    """Number format: `nvfp4 g16`, `int4 g128`, `BF16`, `Q4_K`."""
    tensors: Tensors
    """Weights, each counted once however many tensors it is stored as."""
    parameters: Parameters
    """Of those weights."""
    bytes: Bytes
    """With their scales."""
    source_bytes: Bytes | None = None
    """What the same weights took in the source; null where nobody counted."""


class TensorError(Record):
    """Round-trip error of one quantized weight: what it is once stored and decoded, against what was to be stored."""

    module: str
    """Its name in the checkpoint."""
    role: str
    """What it does: `attention.q`, `mlp.down`, `expert.gate`, `mtp.mlp.up`."""
    layer: Number | None
    """Of the trunk, or of the MTP head; null outside of layers."""
    scheme: str
    """Number format: `nvfp4 g16`."""
    mean_abs: Weight
    """Mean absolute error."""
    max_abs: Weight
    """Largest absolute error."""
    relative_rms: Ratio
    """Root mean square of the error over that of the weight."""


class RunFacts(Record):
    """What the run that finished took."""

    seconds: Seconds
    """From its command to the finished folder."""
    peak_rss: Bytes
    """Memory of the process at most."""
    threads: Annotated[int, unit("threads")]
    """That torch computed with."""
    resumed_tensors: Tensors = 0
    """That an earlier, unfinished run had written."""
    device: str = "cpu"
    """Where layers ran."""
    compute: str = "float32"
    """In which numbers."""
    peak_vram: Bytes | None = None
    """GPU memory held at most; null without a GPU."""


class CalibrationFacts(Record):
    """What a calibrated run read and what its methods said."""

    text: str
    """The name of the text."""
    text_sha256: str
    """SHA-256 of its file."""
    ids_sha256: str
    """SHA-256 of the rows' token ids."""
    rows: Rows
    """That were read."""
    length: Tokens
    """Of each row."""
    images: Annotated[int, unit("images")] = 0
    """In the rows."""
    images_sha256: str | None = None
    """SHA-256 of their bytes and places."""
    left_out: Annotated[dict[str, int], unit("records of the text")] = Field(default_factory=dict)
    """Records that gave no row, or no images, by reason."""
    lost_rows: Annotated[list[tuple[int, int]], unit("numbers of layer and row, from 0")] = Field(default_factory=list)
    """Rows that were left out on the way because their hidden states were not finite."""
    reports: dict[str, str] = Field(default_factory=dict)
    """What each method said of each set of weights, by its name; fallbacks are among them."""
