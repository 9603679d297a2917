"""What number format a weight is stored in.

A `Scheme` says how numbers are represented, and nothing about how they were chosen (methods) or where their bytes go (formats).
Weights are matrices [out, in]; groups run along `in`.

| kind    | a value is                          | scales                                             |
|---------|-------------------------------------|----------------------------------------------------|
| `int`   | (code - zero) * scale               | one per `group` columns and row, in `scale_dtype`  |
| `nvfp4` | E2M1(code) * scale / outer          | FP8 E4M3 per 16, one FP32 divisor per fused set    |
| `mxfp4` | E2M1(code) * 2^e                    | E8M0 exponent per 32                               |
| `fp8`   | E4M3(code) * scale                  | one per row, or one per `block` (128x128)          |

Releases of others also have one scale for a whole weight (`tensor`): such are read, not written.

A scheme may also ask engines to round what the layer reads, so that the product runs on the units for short numbers (see `activation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["int", "nvfp4", "mxfp4", "fp8"]
Search = Literal["none", "mse", "four-over-six"]
Activations = Literal["none", "nvfp4", "fp8"]
"""What recipes can ask for."""
StoredActivations = Literal["none", "nvfp4", "fp8", "fp8-tensor", "fp8-group", "int8"]
"""What releases can say, others' among them."""


@dataclass(frozen=True)
class Scheme:
    """One number format.

    Attributes:
        kind: the family of formats, see the table above.
        bits: bits per code: 4 or 8 for `int`, 4 for the FP4 kinds, 8 for `fp8`.
        group: columns that share a scale; None means the whole row (per channel).
        block: (rows, columns) that share a scale; only `fp8`.
        symmetric: no zero point; only `int` can be asymmetric.
        full_range: `int` symmetric only: a signed scale of +-amax / 2^(bits-1), its sign chosen so that the value of largest
            magnitude lands exactly on the most negative code. Off: amax / (2^bits - 1) * 2.
        search: how scales are chosen: from the largest magnitude (`none`), by least squared error over shrunken
            scales (`mse`), or for `nvfp4` by the better of mapping a block's largest value to 6 or to 4 (`four-over-six`).
        ordered: `int` with groups only: the file says for every column which group it is of (`Quantized.group_of_column`; GPTQ's desc_act).
        activations: what engines round the layer's input to. `nvfp4`, with weights in `nvfp4`: E2M1 with an FP8 scale for each 16 numbers of a token, found as they
            come, over one divisor that calibration finds. `fp8`, with `fp8` weights of a scale per row: E4M3 with a scale for each token, found as it comes.
            Only read: `fp8-tensor`: E4M3 with one stored scale for all tokens; `fp8-group`, with blocks: E4M3 with a scale for as many numbers of a token as a block is wide,
            found as they come; `int8`, with `int` weights of 8 bits: integers with a scale for each token, found as it comes.
        tensor: one scale for the whole weight; `fp8`, or `int` of 8 bits. Only read.
    """

    kind: Kind
    bits: int
    group: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    full_range: bool = False
    search: Search = "none"
    ordered: bool = False
    activations: StoredActivations = "none"
    tensor: bool = False

    @property
    def label(self) -> str:
        """A short name for tables: `int4 g128`, `nvfp4 g16`, `fp8 128x128`, `nvfp4 g16 w4a4`, `fp8 tensor w8a8 static`."""
        text = f"{self.kind}{self.bits}" if self.kind == "int" else self.kind
        if self.block:
            text += f" {self.block[0]}x{self.block[1]}"
        elif self.group:
            text += f" g{self.group}"
        else:
            text += " tensor" if self.tensor else " channel"
        rounded = {"none": "", "nvfp4": f" w{self.bits}a4", "fp8-tensor": f" w{self.bits}a8 static"}.get(
            self.activations, f" w{self.bits}a8"
        )
        return text + ("" if self.symmetric else " asym") + (" ordered" if self.ordered else "") + rounded


SCHEMES: dict[str, Scheme] = {
    "int4": Scheme("int", 4, group=128, full_range=True),
    "int4-asym": Scheme("int", 4, group=128, symmetric=False),
    "int8": Scheme("int", 8, group=128),
    "int8-asym": Scheme("int", 8, group=128, symmetric=False),
    "nvfp4": Scheme("nvfp4", 4, group=16),
    "nvfp4-w4a4": Scheme("nvfp4", 4, group=16, activations="nvfp4"),
    "mxfp4": Scheme("mxfp4", 4, group=32),
    "fp8": Scheme("fp8", 8),
    "fp8-w8a8": Scheme("fp8", 8, activations="fp8"),
    "fp8-block": Scheme("fp8", 8, block=(128, 128)),
}
"""Schemes by the name that recipes use."""
