"""Moving a scale per channel from one weight to another without changing what the network computes.

A norm or a linear layer produces channels, others read them. Divide what is produced by s, multiply the columns of *every* reader by s: the
product is the same. Every reader: in a mixture of experts the router and the shared expert's gate read the norm too, and one that is left
out reads a distorted input.

Arithmetic is done in float64 and rounded once, to float32. Where a scale is 1 nothing is touched, bit for bit.

    scales = storable(norm, scales, zero_centred=True, dtype=torch.bfloat16)
    norm = fold_norm(norm, scales, zero_centred=True).to(torch.bfloat16)
    readers = [scale_columns(weight, scales) for weight in readers]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def fold_norm(weight: Tensor, scales: Tensor, zero_centred: bool) -> Tensor:
    """The weight [channels] of a norm whose output is to be divided by `scales` [channels].

    A norm that applies 1 + w (`zero_centred`) becomes w' = (1 + w) / s - 1, any other w' = w / s.

    Returns:
        float32; the very same tensor where all scales are 1.
    """
    if _all_ones(scales):
        return weight
    wide, divisor = weight.to(torch.float64), scales.to(torch.float64)
    # (1 + w) / s - 1, written so that it does not lose the digits of a small w to the 1.
    folded = (wide + (1.0 - divisor)) / divisor if zero_centred else wide / divisor
    return torch.where(divisor == 1, wide, folded).to(torch.float32)


def storable(weight: Tensor, scales: Tensor, zero_centred: bool, dtype: torch.dtype) -> Tensor:
    """The scales next to these that a norm stored in `dtype` divides by exactly, float32 [channels].

    A bfloat16 norm cannot hold every (1 + w) / s - 1: with s = 20 it is about -0.95, where its steps are 0.004, up to 4% of the gain of 0.05 that is
    left. So the norm is rounded first, and the readers are multiplied by what it then really divides by. A channel whose gain is zero, or would
    round to zero or overflow, keeps 1.
    """
    centre = 1.0 if zero_centred else 0.0
    gain = weight.to(torch.float64) + centre
    stored = fold_norm(weight, scales, zero_centred).to(dtype).to(torch.float64) + centre
    real = (gain / stored).to(torch.float32)
    usable = torch.isfinite(real) & (real > 0) & (scales != 1)
    return torch.where(usable, real, torch.ones_like(real))


def scale_columns(weight: Tensor, scales: Tensor) -> Tensor:
    """A reader [..., out, in] of channels that are now divided by `scales` [in]: its columns times them.

    Returns:
        float32; the very same tensor where all scales are 1.
    """
    if _all_ones(scales):
        return weight
    return weight.to(torch.float32) * scales.to(torch.float32)


def scale_rows(weight: Tensor, scales: Tensor) -> Tensor:
    """A linear source [..., out, in] whose output channels are to be divided by `scales` [out]: its rows, divided. A bias is a column of its own.

    Returns:
        float32; the very same tensor where all scales are 1.
    """
    if _all_ones(scales):
        return weight
    return weight.to(torch.float32) / scales.to(torch.float32).unsqueeze(-1)


@dataclass(frozen=True)
class Repeated:
    """Channels that readers see several times over: v into o, where a value head serves `times` query heads that follow each other.

    The output gate of Qwen3.5's attention multiplies what o reads channel by channel, so a scale passes through it; softmax mixes positions, not
    channels, so it passes through that too.

    Attributes:
        heads: value heads.
        times: query heads for each of them.
        width: channels of a head.
    """

    heads: int
    times: int
    width: int

    def spread(self, source: Tensor) -> Tensor:
        """Values of the source's channels [heads * width] at the reader's columns [heads * times * width]."""
        return source.view(self.heads, 1, self.width).expand(-1, self.times, -1).reshape(-1)

    def pool(self, reader: Tensor) -> Tensor:
        """The mean of what belongs to each of the source's channels, from values at the reader's columns."""
        return reader.view(self.heads, self.times, self.width).mean(1).reshape(-1)


def _all_ones(scales: Tensor) -> bool:
    return bool((scales == 1).all())
