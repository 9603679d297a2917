"""Activations in four and eight bits: what an engine does to the input of a linear layer before it multiplies, done here in float32.

W4A4 and W8A8 layers multiply short numbers by short numbers. The weights were rounded once; their input is rounded as it comes, token by token:

- NVFP4: 16 neighbouring numbers of a token share an FP8 E4M3 scale, amax / 6 * outer, and a value is E2M1(code) * (scale / outer). The scale is found as the block comes; `outer`, the one
  number that a calibration has to find, sets the window of about 17 binary orders in which scales can lie. A block whose amax is above 448 * 6 / outer is cut
  off there; blocks that are much smaller are rounded more coarsely, and to zero in the end.
- FP8: E4M3(code) * scale; a scale for each token, amax / 448, found as it comes, or for each so many neighbouring numbers of a token, or one stored scale for all.
- INT8: code * scale, codes -128..127; a scale for each token, amax / 127.5, found as it comes.

The arithmetic is that of the compressed-tensors library on float32 inputs, operation by operation, and so that of transformers, which runs it. The kernels of GPUs
multiply by reciprocals where it divides: the same up to ties, which a difference of one bit may turn; those for INT8 lay amax on the code 127, which makes their steps larger by 1/254. Weights of NVFP4 keep their scales at 2^-6 and
above (see `float4`); activations do not, their kernels read smaller scales as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwench.numerics.chunks import Tile, Workspace, work_through
from qwench.numerics.float4 import E4M3_LARGEST, LARGEST, block_largest, magnitude, round_e2m1

GROUP = 16
ZERO_SCALE = 0.125
"""Stands for a block scale that rounds to 0. What it scales rounds to 0 either way: it is below 6 * 2^-10 / 0.125 of E2M1's first step."""


@dataclass(frozen=True)
class InputRounding:
    """What is done to what a linear layer reads.

    Attributes:
        kind: the numbers.
        scale: `nvfp4`: the divisor (`outer`), positive and finite. `fp8`: the one scale of all tokens; None: each token has its own.
        group: `fp8` without a stored scale: how many neighbouring numbers of a token share one; None: all of them.
    """

    kind: Literal["nvfp4", "fp8", "int8"]
    scale: float | None = None
    group: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The values that the engine multiplies with, of the shape and dtype of x [..., I]."""
        if self.kind == "fp8":
            return round_fp8(x, self.scale, self.group)
        if self.kind == "int8":
            return round_int8(x)
        assert self.scale is not None, "the divisor of NVFP4 activations is stored"
        return round_nvfp4(x, self.scale)


def round_nvfp4(x: Tensor, outer: float) -> Tensor:
    """Activations [..., I] rounded to NVFP4, I a multiple of 16; NaN spoils its block, infinity is cut off like anything too large.

    Args:
        outer: the divisor of the whole tensor: 448 * 6 / the largest magnitude that blocks can have without being cut off.
    """
    assert x.shape[-1] % GROUP == 0, f"{x.shape[-1]} columns are no whole blocks"
    values = torch.empty_like(x, memory_format=torch.contiguous_format)
    matrix, result = x.reshape(-1, x.shape[-1]), values.view(-1, x.shape[-1])

    def work(tile: Tile, space: Workspace) -> None:
        part = tile.of(matrix)
        blocks = magnitude(part, space).view(-1, GROUP)
        step = block_scale(block_largest(blocks), outer).div_(outer)
        rounded = round_e2m1(blocks, step, space).mul_(step.view(-1, 1))
        tile.of(result).copy_(torch.copysign(rounded.view(part.shape), part.to(torch.float32)))

    work_through(matrix, work)
    return values


def block_scale(amax: Tensor, outer: float) -> Tensor:
    """The E4M3 scale of blocks of largest magnitude `amax` (float32), in float32, before the division by `outer`."""
    scale = (amax / LARGEST).mul_(outer).clamp_(max=E4M3_LARGEST).to(torch.float8_e4m3fn).to(torch.float32)
    return torch.where(scale == 0, ZERO_SCALE, scale)


def round_fp8(x: Tensor, scale: float | None = None, group: int | None = None) -> Tensor:
    """Activations [..., I] rounded to E4M3; `scale` None: amax / 448 of each token, or of each `group` neighbouring numbers of one, the last of which may be fewer."""
    wide = x.to(torch.float32)
    if scale is None and group is not None:
        whole = torch.nn.functional.pad(wide, (0, -x.shape[-1] % group))
        rounded = round_fp8(whole.view(*whole.shape[:-1], -1, group)).view(whole.shape)
        return rounded[..., : x.shape[-1]].to(x.dtype)
    step = torch.tensor(scale) if scale is not None else _step_of_tokens(wide, E4M3_LARGEST)
    codes = (wide / step).clamp_(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)
    return codes.to(torch.float32).mul_(step).to(x.dtype)


def round_int8(x: Tensor) -> Tensor:
    """Activations [..., I] rounded to -128..127 steps of amax / 127.5 of each token."""
    wide = x.to(torch.float32)
    step = _step_of_tokens(wide, 127.5)
    return (wide / step).clamp_(-128, 127).round_().mul_(step).to(x.dtype)


def _step_of_tokens(wide: Tensor, largest: float) -> Tensor:
    """What a code of 1 stands for, [..., 1]; a token of zeros gets a step that is not 0."""
    step = wide.abs().amax(-1, keepdim=True) / largest
    return torch.where(step == 0, torch.finfo(torch.float32).eps, step)
