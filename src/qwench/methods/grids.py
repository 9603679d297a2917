"""The numbers that a scheme can represent, seen column by column: what methods with error feedback round to.

Such methods (GPTQ) round one input column of a matrix after the other and need, for the column at hand, the nearest representable values
under scales that are already decided. In every scheme a value is

    value = (level - zero) * scale

and only the set of levels differs: integers, or the numbers of E2M1 or E4M3. So one `Grid` serves all of them: `fit` decides scales,
`nearest` takes quotients to levels, `codes` turns levels into what is stored.

Matrices are transposed here, [in, out]: a column of the weight is then contiguous. Letters in names: I input columns, R rows (outputs),
G groups. Everything runs on the device of its input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.numerics import Scheme
from qwench.numerics.float4 import fits_mxfp4, fits_nvfp4
from qwench.numerics.float8 import LARGEST as E4M3_LARGEST
from qwench.numerics.float8 import fit_fp8
from qwench.numerics.integer import SHRINK, fit_integer

E2M1_LARGEST = 6.0
EXPONENT_BITS = 0x7F800000
ONE_BITS = 0x3F800000
FIT_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Elements whose scales are fitted at once: on a processor what fits its cache."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integers to view stored scales as, by bytes: not every device selects and permutes 8-bit floats."""


@dataclass(frozen=True)
class Scales:
    """Scales of a transposed matrix [I, R].

    Attributes:
        stored: as a container stores them, but transposed: [G, R], or [G, ceil(R / 128)] for blocks of 128x128.
        scale_GR: as a reader sees them, float32 (for `nvfp4` with the outer scale applied).
        zero_GR: zero points as float32; None in a symmetric scheme.
    """

    stored: Tensor
    scale_GR: Tensor
    zero_GR: Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """What one scheme can represent.

    Attributes:
        scheme: its `search` decides which scales `fit` tries.
        scale_dtype: what `int` and `fp8` scales are stored in.
        outer: the divisor of the fused set, only `nvfp4`.
    """

    scheme: Scheme
    scale_dtype: torch.dtype = torch.bfloat16
    outer: float = 1.0

    def width(self, columns: int) -> int:
        """Columns that share a scale in a matrix of so many."""
        if self.scheme.block is not None:
            return self.scheme.block[1]
        return self.scheme.group or columns

    def fit(self, weight_IR: Tensor, importance_I: Tensor | None = None) -> Scales:
        """Decides the scales of consecutive groups of columns. Equal to those of `numerics.encode` where `importance_I` is None.

        Args:
            weight_IR: float32; I may be anything for `fp8`, else a multiple of the group; R starts at an edge of a block.
            importance_I: how much a squared error in each column weighs when a search compares scales; None: all the same.
        """
        if self.scheme.kind == "fp8":
            return self._fit_fp8(weight_IR)
        width, (columns, rows) = self.width(len(weight_IR)), weight_IR.shape
        at_once = max(1, FIT_ELEMENTS.get(weight_IR.device.type, 1 << 26) // columns)
        weights = None if importance_I is None else importance_I.view(-1, width, 1)
        assert columns % width == 0 and rows > 0
        parts = [
            self._search(part.reshape(columns // width, width, -1), weights) for part in torch.split(weight_IR, at_once, 1)
        ]
        zeros = [part.zero_GR for part in parts if part.zero_GR is not None]
        return Scales(
            _joined_bits([part.stored for part in parts], 1).view(parts[0].stored.dtype),
            torch.cat([part.scale_GR for part in parts], 1),
            torch.cat(zeros, 1) if zeros else None,
        )

    def nearest(self, quotient: Tensor) -> Tensor:
        """The nearest level to each quotient, value / scale + zero, in place: float32, ties to the even code, clamped to the range."""
        if self.scheme.kind == "int":
            half = 2 ** (self.scheme.bits - 1)
            return quotient.round_().clamp_(-half, half - 1)
        if self.scheme.kind == "fp8":
            return quotient.copy_(quotient.clamp_(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn))
        return _nearest_e2m1(quotient)

    def rounded(self, weight_IR: Tensor) -> Tensor:
        """Plain rounding: the nearest values under scales of consecutive groups, float32 [I, R]."""
        scales, width = self.fit(weight_IR), self.width(len(weight_IR))
        scale, zero = (
            None if t is None else t.repeat_interleave(width, 0)[: len(weight_IR)] for t in (scales.scale_GR, scales.zero_GR)
        )
        assert scale is not None
        quotient = weight_IR / scale
        level = self.nearest(quotient if zero is None else quotient.add_(zero))
        return (level if zero is None else level.sub_(zero)).mul_(scale)

    def codes(self, level: Tensor) -> Tensor:
        """Levels as they are stored: int8, uint8 or float8_e4m3fn."""
        if self.scheme.kind == "int":
            return level.to(torch.int8)
        if self.scheme.kind == "fp8":
            return level.to(torch.float8_e4m3fn)
        magnitude = level.abs()
        # 0, .5, 1, 1.5, 2, 3, 4, 6 -> 0..7: a concave curve, the least of three lines.
        index = torch.minimum(torch.minimum(magnitude * 2, magnitude + 2), magnitude * 0.5 + 4)
        return index.to(torch.uint8) | (torch.signbit(level).to(torch.uint8) << 3)

    def _fit_fp8(self, weight_IR: Tensor) -> Scales:
        columns, rows = weight_IR.shape
        down, across = self.scheme.block or (1, columns)
        stored = fit_fp8(weight_IR, across, down, self.scale_dtype)
        return Scales(stored, stored.float().repeat_interleave(down, 1)[:, :rows])

    def candidates(self, weight_GWR: Tensor) -> list[Scales]:
        """The scales that the search tries for groups of W columns, the plain one first; not for `fp8`, which has no search."""
        assert self.scheme.kind != "fp8"
        low, high = torch.amin(weight_GWR, 1), torch.amax(weight_GWR, 1)
        if self.scheme.kind == "int":
            factors = SHRINK if self.scheme.search == "mse" else (1.0,)
            fits = [fit_integer(low * factor, high * factor, self.scheme, self.scale_dtype) for factor in factors]
            return [Scales(scale.to(self.scale_dtype), scale, zero) for scale, zero in fits]
        amax = torch.maximum(high, -low)
        if self.scheme.kind == "nvfp4":
            found = fits_nvfp4(amax, self.outer, self.scheme.search)
            return [Scales(stored.to(torch.float8_e4m3fn), scale) for stored, scale in found]
        return [Scales(stored.to(torch.uint8), scale) for stored, scale in fits_mxfp4(amax, self.scheme.search)]

    def _search(self, weight_GWR: Tensor, importance_GW1: Tensor | None) -> Scales:
        """For each group and row the candidate of least squared error, the first one of equals."""
        best, *others = self.candidates(weight_GWR)
        if not others:
            return best
        unit, least = best.scale_GR.abs(), self._error(best, best.scale_GR.abs(), weight_GWR, importance_GW1)
        for other in others:
            error = self._error(other, unit, weight_GWR, importance_GW1)
            better = error < least
            least = torch.where(better, error, least)
            best = choose(better, other, best)
        return best

    def _error(self, fit: Scales, unit_GR: Tensor, weight_GWR: Tensor, importance_GW1: Tensor | None) -> Tensor:
        """Sums of squared errors [G, R], in units of the first scale: squares of tiny weights would vanish in float32."""
        zero = None if fit.zero_GR is None else fit.zero_GR.unsqueeze(1)
        scale = fit.scale_GR.unsqueeze(1)
        quotient = weight_GWR / scale
        level = self.nearest(quotient if zero is None else quotient.add_(zero))
        error = (level if zero is None else level.sub_(zero)).mul_(scale).sub_(weight_GWR).div_(unit_GR.unsqueeze(1)).square_()
        return (error if importance_GW1 is None else error.mul_(importance_GW1)).sum(1)


def joined(fits: list[Scales], order: Tensor) -> Scales:
    """Scales of single groups, put in order: `order` holds the place in `fits` of each group."""
    stored = _joined_bits([fit.stored for fit in fits], 0)[order].view(fits[0].stored.dtype)
    zeros = [fit.zero_GR for fit in fits if fit.zero_GR is not None]
    return Scales(stored, torch.cat([fit.scale_GR for fit in fits])[order], torch.cat(zeros)[order] if zeros else None)


def _joined_bits(parts: list[Tensor], dimension: int) -> Tensor:
    return torch.cat([part.view(_BITS[part.element_size()]) for part in parts], dimension)


def choose(where: Tensor, one: Scales, other: Scales) -> Scales:
    """`one` where told, else `other`."""
    bits = _BITS[one.stored.element_size()]
    zero = None
    if one.zero_GR is not None and other.zero_GR is not None:
        zero = torch.where(where, one.zero_GR, other.zero_GR)
    stored = torch.where(where, one.stored.view(bits), other.stored.view(bits)).view(one.stored.dtype)
    return Scales(stored, torch.where(where, one.scale_GR, other.scale_GR), zero)


def _nearest_e2m1(quotient: Tensor) -> Tensor:
    """E2M1 of float32 numbers: adding 2^(e+22), whose step is that of E2M1 at exponent e >= 0, lets the adder round (see `numerics.float4`)."""
    magnitude = quotient.abs().clamp_(max=E2M1_LARGEST)
    large = magnitude.view(torch.int32).bitwise_and(EXPONENT_BITS).clamp_min_(ONE_BITS).add_(22 << 23).view(torch.float32)
    return torch.copysign(magnitude.add_(large).sub_(large), quotient, out=quotient)
