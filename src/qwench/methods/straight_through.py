"""Number formats as functions that a gradient can pass, on any device.

`qwench.numerics` rounds on the CPU, tile by tile, and is the truth. Methods that search need the same numbers where the activations are, and
methods that train need them as a function: of the weight, of an offset V that is added before rounding (in steps of the grid), and of factors
on the range of each group. With V = 0 and factors 1 the codes and scales here are those of `encode`, bit for bit; tests hold that.

Rounding has no useful gradient; it is taken to be the identity (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432). Clamping
passes no gradient where it acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwench.numerics import Quantized, Scheme, decode, encode, outer_scale

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Tuning:
    """What can be trained about the rounding of one matrix; float32.

    Attributes:
        offset: [out, in], added before rounding, in steps of the grid: within +-0.5.
        low, high: [out, groups], factors on the lowest and the highest value of each group: at least 0. NVFP4 uses `high` alone.
    """

    offset: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Rounded:
    """A matrix on its grid, as float32 that gradients pass through.

    Attributes:
        codes: [out, in]: integer codes, or E2M1 values with their signs.
        scales: [out, groups]: as they are stored (NVFP4: before the division by `outer`).
        zeros: [out, groups], only asymmetric `int`.
        outer: float32 [1], only `nvfp4`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    outer: Tensor | None

    def values(self) -> Tensor:
        """What the codes stand for, float32 [out, in]."""
        scales = self.scales if self.outer is None else self.scales / self.outer
        codes = _by_group(self.codes, scales)
        if self.zeros is not None:
            codes = codes - self.zeros.unsqueeze(-1)
        return (codes * scales.unsqueeze(-1)).flatten(1)

    def quantized(self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
        """The same as codes to store, on the CPU; `error` is left open. `weight` gives zeros their sign, as `encode` does."""
        outer = None if self.outer is None else self.outer.cpu()
        if scheme.kind == "nvfp4":
            magnitudes = torch.tensor(E2M1, device=self.codes.device)
            index = torch.searchsorted(magnitudes, self.codes.abs().contiguous()).to(torch.uint8)
            negative = torch.where(index == 0, torch.signbit(weight), self.codes < 0)
            codes = index | (negative.to(torch.uint8) << 3)
            return Quantized(scheme, codes.cpu(), self.scales.to(torch.float8_e4m3fn).cpu(), outer=outer)
        zeros = None if self.zeros is None else self.zeros.to(torch.int8).cpu()
        return Quantized(scheme, self.codes.to(torch.int8).cpu(), self.scales.to(scale_dtype).cpu(), zeros)


def tunable_complaint(scheme: Scheme) -> str | None:
    """Why there is no trainable rounding for a scheme, or None."""
    if scheme.kind not in ("int", "nvfp4"):
        return f"{scheme.label} has no trainable rounding: int and nvfp4 have"
    if scheme.ordered:
        return f"{scheme.label}: columns that are ordered come from GPTQ, trained rounding leaves them where they are"
    if scheme.search != "none":
        return f"a search of scales ({scheme.search}) and training them are two answers to one question: leave the search out"
    return None


def groups_of(weight: Tensor, scheme: Scheme) -> int:
    """Groups in a row of a matrix [out, in]."""
    return int(weight.shape[1]) // (scheme.group or int(weight.shape[1]))


def untuned(weight: Tensor, scheme: Scheme) -> Tuning:
    """The start of every training: rounding to nearest."""
    ones = torch.ones(weight.shape[0], groups_of(weight, scheme), device=weight.device)
    return Tuning(torch.zeros(weight.shape, device=weight.device), ones, ones.clone())


Ranges = tuple[Tensor, Tensor]
"""The lowest and the highest value that each group's codes should span, both float32 [out, groups]."""


def ranges_of(start: Quantized) -> Ranges:
    """The ranges from which the scales of `start` come, and its zero points: what `round_tuned` fits to them is what they are."""
    scheme, scales = start.scheme, start.scales.to(torch.float32)
    half = 2 ** (scheme.bits - 1)
    if scheme.kind == "nvfp4":
        assert start.outer is not None
        highest = scales / start.outer * E2M1[-1]
        return -highest, highest
    if start.zeros is not None:
        zeros = start.zeros.to(torch.float32)
        return (-half - zeros) * scales, (half - 1 - zeros) * scales
    if scheme.full_range:  # the sign of the scale says on which side the extreme is
        extreme = scales * -half
        return extreme.clamp(max=0), extreme.clamp(min=0)
    return scales * -(half - 0.5), scales * (half - 0.5)


def round_tuned(
    weight: Tensor,
    scheme: Scheme,
    tuning: Tuning,
    outer: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    ranges: Ranges | None = None,
) -> Rounded:
    """A matrix [out, in] on its grid, differentiable in `tuning`.

    Args:
        scheme: one that `tunable_complaint` has nothing against.
        outer: float32 [1], `nvfp4` only, the divisor of the fused set; None: of this matrix alone.
        scale_dtype: what `int` scales are stored in.
        ranges: what the factors of `tuning` multiply; None: what the groups span.
    """
    assert (wrong := tunable_complaint(scheme)) is None, wrong
    groups = weight.to(torch.float32).reshape(weight.shape[0], groups_of(weight, scheme), -1)
    lowest, highest = ranges or (groups.amin(-1), groups.amax(-1))
    low, high = lowest * tuning.low, highest * tuning.high
    offset = tuning.offset.view(groups.shape)
    if scheme.kind == "int":
        scales, zeros = _integer_fit(low, high, scheme, scale_dtype)
        return Rounded(_integer_codes(groups, offset, scales, zeros, scheme.bits).flatten(1), scales, zeros, None)
    outer = (outer_scale(groups.abs().amax().cpu()) if outer is None else outer).to(weight.device)
    scales = _e4m3(torch.maximum(highest, -lowest) * tuning.high / _number(6.0, groups) * outer)
    return Rounded(_e2m1(groups / (scales / outer).unsqueeze(-1), offset).flatten(1), scales, None, outer)


@torch.no_grad()
def nearest_values(
    weight: Tensor, scheme: Scheme, outer: Tensor | None = None, scale_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """decode(encode(weight)), float32 [out, in], where the weight is. Schemes without a trainable rounding go by way of the CPU."""
    if weight.device.type == "cpu" or tunable_complaint(scheme) is not None:
        return decode(encode(weight.cpu(), scheme, outer, scale_dtype)).to(weight.device)
    return round_tuned(weight, scheme, untuned(weight, scheme), outer, scale_dtype).values()


EDGE = 0.01
"""How far, in steps of the grid, a weight that is moved into the cell of its code stays from the cell's edge."""


def centred(weight: Tensor, start: Quantized) -> Tensor:
    """The values next to a weight [out, in] that round to the codes of `start` under its scales, float32: the weight itself where it does.

    Codes that a method chose against the nearest one (error feedback) are a start for training like any other: seen from here they are the nearest. The
    weight stays as near as it can, so that the way back is the shortest one.
    """
    scales = start.scales.to(torch.float32) if start.outer is None else start.scales.to(torch.float32) / start.outer
    groups, codes = _by_group(weight.to(torch.float32), scales), _by_group(start.codes, scales)
    scales = scales.unsqueeze(-1)
    zeros = None if start.zeros is None else start.zeros.to(torch.float32).unsqueeze(-1)
    quotient = groups / scales if zeros is None else groups / scales + zeros
    low, high = _cells(codes, start.scheme)
    inside = quotient.clamp(low, high)
    moved = (inside if zeros is None else inside - zeros) * scales
    return torch.where(inside == quotient, groups, moved).flatten(1)


def _cells(codes: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The quotients that round to each code, less a little at their edges; the outermost codes take all beyond them."""
    if scheme.kind == "int":
        half = 2 ** (scheme.bits - 1)
        middle = codes.to(torch.float32)
        low = torch.where(codes == -half, -torch.inf, middle - (0.5 - EDGE))
        return low, torch.where(codes == half - 1, torch.inf, middle + (0.5 - EDGE))
    levels = torch.tensor(E2M1, device=codes.device)
    between = (levels[1:] + levels[:-1]) / 2
    margin = EDGE * levels.diff()
    low = torch.cat([-(between[:1] - margin[:1]), between + margin])
    high = torch.cat([between - margin, torch.tensor([torch.inf], device=codes.device)])
    index, negative = (codes & 7).long(), (codes & 8) > 0
    return torch.where(negative, -high[index], low[index]), torch.where(negative, -low[index], high[index])


class _StraightThrough(torch.autograd.Function):
    """Answers `exact`, and pretends to be `smooth` to gradients."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _instead(smooth: Tensor, exact: Tensor) -> Tensor:
    result: Tensor = _StraightThrough.apply(smooth, exact.detach())  # type: ignore[no-untyped-call]
    return result


def _round(values: Tensor) -> Tensor:
    return _instead(values, values.round())


def _number(value: float, like: Tensor) -> Tensor:
    """A constant on the device: GPUs divide by a plain number by multiplying with its reciprocal, which rounds twice."""
    return torch.tensor(value, device=like.device)


def _by_group(matrix: Tensor, scales: Tensor) -> Tensor:
    return matrix.view(scales.shape[0], scales.shape[1], -1)


def _integer_fit(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points for groups that span [low, high], both [out, groups]; see `qwench.numerics.integer`."""
    half = 2 ** (scheme.bits - 1)
    if scheme.symmetric and scheme.full_range:
        return _stored(torch.where(high >= -low, high, low) / -half, half, dtype), None
    if scheme.symmetric:
        return _stored(torch.maximum(high, -low) / _number(half - 0.5, low), half, dtype), None
    low, high, steps = low.clamp(max=0.0), high.clamp(min=0.0), _number(2 * half - 1, low)
    scale = _stored(high / steps - low / steps, 2 * half, dtype)
    return scale, _round(-half - low / scale).clamp(-half, half - 1)


def _stored(scale: Tensor, largest_code: int, dtype: torch.dtype) -> Tensor:
    """A scale as it will be read back; its magnitude is bounded as in `qwench.numerics.integer`."""
    info = torch.finfo(dtype)
    magnitude = scale.abs().clamp(info.tiny, min(info.max, torch.finfo(torch.bfloat16).max) / largest_code)
    bounded = torch.where(scale < 0, -magnitude, magnitude)
    return _instead(bounded, bounded.to(dtype).to(torch.float32))


def _integer_codes(groups: Tensor, offset: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    quotient = groups / scales.unsqueeze(-1)
    if zeros is not None:
        quotient = quotient + zeros.unsqueeze(-1)
    half = 2 ** (bits - 1)
    return _round(quotient + offset).clamp(-half, half - 1)


def _e4m3(scale: Tensor) -> Tensor:
    """Positive numbers to the nearest E4M3 in [2^-6, 448]."""
    bounded = scale.clamp(2.0**-6, 448.0)
    return _instead(bounded, bounded.to(torch.float8_e4m3fn).to(torch.float32))


def _e2m1(quotient: Tensor, offset: Tensor) -> Tensor:
    """Numbers to E2M1 values: within a binade its steps are even, 2^(exponent - 1), and 0.5 below 1."""
    bounded = quotient.clamp(-6.0, 6.0)
    with torch.no_grad():
        exponent = torch.frexp(bounded)[1].sub_(1).clamp_(min=0)
        step = torch.ldexp(torch.full_like(bounded, 0.5), exponent)
    return (_round(bounded / step + offset) * step).clamp(-6.0, 6.0)
