"""Rounding to nearest: every weight takes the nearest code, no data is looked at.

Frantar et al. 2022 (GPTQ, arXiv:2210.17323) name it RTN and measure it as the baseline of all calibrated methods; down to about 8 bits it is
as good as they are, at 4 bits it is close where groups are small.

What is left to choose is the scales (`Scheme.search`), and what matrices share: engines fuse some of them into one (q/k/v; gate/up; the
inputs of a Gated DeltaNet) and read one NVFP4 divisor for all, so that it must come from the largest magnitude of the whole set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwench.numerics import Quantized, Scheme, encode, largest_magnitude, outer_scale


def round_to_nearest(
    weight: Tensor, scheme: Scheme, outer: Tensor | None = None, scale_dtype: torch.dtype = torch.bfloat16
) -> Quantized:
    """One matrix [out, in] in a scheme.

    Args:
        outer: float32 [1], `nvfp4` only: the divisor of the fused set that the matrix belongs to, see `shared_outer`. None: its own.
        scale_dtype: what `int` and `fp8` scales are stored in.
    """
    return encode(weight, scheme, outer, scale_dtype)


def shared_outer(weights: Sequence[Tensor], scheme: Scheme) -> Tensor | None:
    """The divisor that a fused set must share, float32 [1], from the largest magnitude over all its members; None where the scheme has none."""
    if scheme.kind != "nvfp4":
        return None
    return outer_scale(max(largest_magnitude(weight) for weight in weights))


def round_fused(weights: Sequence[Tensor], scheme: Scheme, scale_dtype: torch.dtype = torch.bfloat16) -> list[Quantized]:
    """The matrices of one fused set, with what they must share."""
    outer = shared_outer(weights, scheme)
    return [round_to_nearest(weight, scheme, outer, scale_dtype) for weight in weights]
