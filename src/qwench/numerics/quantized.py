"""The one result type of every method and the one input of every container format."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qwench.numerics.scheme import Scheme


@dataclass(frozen=True)
class RoundTrip:
    """How far decoded values lie from the weight that was encoded.

    Attributes:
        mean_abs: mean of |decoded - weight|.
        max_abs: the largest |decoded - weight|.
        relative_rms: root mean square of the error over that of the weight; 0 for a weight of zeros.
    """

    mean_abs: float
    max_abs: float
    relative_rms: float


@dataclass
class Quantized:
    """A quantized matrix [out, in] in its number format; no packing, no names.

    Attributes:
        scheme: the number format.
        codes: [out, in]. `int`: int8 signed codes (symmetric: -2^(b-1)..2^(b-1)-1; asymmetric likewise, with `zeros` in the same
            range). `nvfp4`, `mxfp4`: uint8 sign<<3 | magnitude index. `fp8`: float8_e4m3fn.
        scales: `int`: [out, groups] in the dtype that will be stored (may be negative, see `Scheme.full_range`). `nvfp4`: float8_e4m3fn
            [out, in/16]. `mxfp4`: uint8 E8M0 exponents (bias 127) [out, in/32]. `fp8`: [out, 1], or [ceil(out/128), ceil(in/128)].
            Where one scale is for the whole weight (`Scheme.tensor`): one number, [1].
        zeros: int8 [out, groups], only asymmetric `int`.
        outer: float32 [1], only `nvfp4`: the divisor shared by a fused set (448 * 6 / amax).
        group_of_column: int32 [in], the group of each column where activation order permuted them; None: column // group.
        input_outer: [1], only where the scheme rounds activations to NVFP4 (float32: the divisor of what this matrix reads) or to FP8 over a stored scale (the scale);
            None until it is known.
        low_rank: (A [r, in], B [out, r]): an additive correction B @ A; not part of `dequantize`.
        error: how far the values lie from the weight; None where it is not known (read from a file).
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    outer: Tensor | None = None
    group_of_column: Tensor | None = None
    input_outer: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    error: RoundTrip | None = None

    def row_scales(self) -> Tensor:
        """The scales with a row for each row of codes where one is for the whole weight; as they are else."""
        return self.scales.reshape(1, 1).expand(self.codes.shape[0], 1) if self.scheme.tensor else self.scales

    def dequantize(self) -> Tensor:
        """The values that these codes stand for, float32 [out, in]."""
        from qwench.numerics import decode

        return decode(self)
