"""Integer codes with a scale for a group of columns or for a whole row: INT4 and INT8.

value = (code - zero) * scale, codes signed: -8..7 or -128..127. The scale is rounded to the dtype that will be stored before the codes are
chosen, so the codes are the nearest ones for the scale that a reader sees. Rounding is to nearest, ties to even, of the float32 quotient
weight / scale, as the compressed-tensors library rounds.

Three ways to fit a scale, all with 2^bits levels:

- symmetric: amax / 7.5 (amax / 127.5 for 8 bits): the range of 15 steps is laid evenly about zero. A weight of +amax is half a step
  beyond the largest code and is clamped.
- symmetric, `full_range`: -extreme / 8, where extreme is the value of largest magnitude with its sign: it lands exactly on the code -8, the
  scale is negative where it is positive, and nothing is clamped unless the other side comes close to it.
- asymmetric: (max - min) / 15 with the range stretched to hold zero, and an integer zero point, so that zero is exact.

`mse` shrinks the range by factors down to 0.6 and keeps, for each group, the scale of least squared error; large values are then clamped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.numerics.chunks import ErrorSums, Tile, Workspace, error_sums, round_trip, work_through
from qwench.numerics.quantized import Quantized
from qwench.numerics.scheme import Scheme

SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6)
"""Factors on the range that the `mse` search tries, the unshrunken first."""


def encode_integer(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.bfloat16) -> Quantized:
    """Rounds a matrix to integers.

    Args:
        weight: [out, in] of any floating type; `in` is a multiple of the group.
        scheme: kind `int`.
        scale_dtype: the floating dtype that the scales will be stored in.
    """
    rows, columns = weight.shape
    group = scheme.group or columns
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // group, dtype=scale_dtype)
    zeros = None if scheme.symmetric else torch.empty(scales.shape, dtype=torch.int8)
    factors = SHRINK if scheme.search == "mse" else (1.0,)

    def work(tile: Tile, space: Workspace) -> ErrorSums:
        part = tile.of(weight)
        values = space.take("values", (part.shape[0], part.shape[1])).copy_(part).view(-1, group)
        low, high = torch.amin(values, 1), torch.amax(values, 1)
        candidates = [fit_integer(low * factor, high * factor, scheme, scale_dtype) for factor in factors]
        scale, zero = _best(values, candidates, scheme.bits, space)
        scales[tile.rows].view(-1).copy_(scale)
        if zeros is not None and zero is not None:
            zeros[tile.rows].view(-1).copy_(zero)
        rounded = _round(values, scale, zero, scheme.bits, space)
        tile.of(codes).copy_(rounded.view(part.shape))
        return error_sums(_decode(rounded, scale, zero).sub_(values), values)

    return Quantized(scheme, codes, scales, zeros, error=round_trip(work_through(weight, work), weight.numel()))


def decode_integer(quantized: Quantized) -> Tensor:
    """The values of an integer matrix, float32 [out, in]."""
    values = torch.empty(quantized.codes.shape, dtype=torch.float32)
    scale, zero = quantized.row_scales().to(torch.float32), quantized.zeros
    if quantized.group_of_column is not None:
        column = quantized.group_of_column.long()
        values.copy_(quantized.codes)
        if zero is not None:
            values.sub_(zero[:, column])
        return values.mul_(scale[:, column])

    def work(tile: Tile, space: Workspace) -> None:
        part = tile.of(values).copy_(tile.of(quantized.codes)).view(-1, values.shape[1] // scale.shape[1])
        _decode(part, scale[tile.rows].view(-1), None if zero is None else zero[tile.rows].view(-1).to(torch.float32))

    work_through(values, work)
    return values


Fit = tuple[Tensor, Tensor | None]
"""Scale and, where asymmetric, zero point of each group, both float32 [groups]."""


def fit_integer(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Fit:
    """Scale and zero point for groups that span [low, high], float32 of one shape; the scale is already rounded to `scale_dtype`."""
    half = 2 ** (scheme.bits - 1)
    if scheme.symmetric and scheme.full_range:
        extreme = torch.where(high >= -low, high, low)
        return _stored(extreme / -half, half, scale_dtype), None
    if scheme.symmetric:
        return _stored(torch.maximum(high, -low) / (half - 0.5), half, scale_dtype), None
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    steps = 2 * half - 1
    # The range is divided before it is taken, so that it cannot overflow.
    scale = _stored(high / steps - low / steps, 2 * half, scale_dtype)
    return scale, torch.round(-half - low / scale).clamp_(-half, half - 1)


def _stored(scale: Tensor, largest_code: int, dtype: torch.dtype) -> Tensor:
    """A scale as it will be read back, float32.

    Its magnitude is kept at the normal numbers of `dtype` (a group of zeros gets the smallest), and low enough that no code overflows float32
    or `dtype`.
    """
    info = torch.finfo(dtype)
    magnitude = scale.abs().clamp_(info.tiny, min(info.max, torch.finfo(torch.bfloat16).max) / largest_code)
    return torch.where(scale < 0, -magnitude, magnitude).to(dtype).to(torch.float32)


def _round(values: Tensor, scale: Tensor, zero: Tensor | None, bits: int, space: Workspace) -> Tensor:
    """Codes as float32, in a buffer of `space`."""
    half = 2 ** (bits - 1)
    quotient = torch.div(values, scale.view(-1, 1), out=space.take("quotient", (values.shape[0], values.shape[1])))
    if zero is not None:
        quotient.add_(zero.view(-1, 1))
    return quotient.round_().clamp_(-half, half - 1)


def _decode(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Float32 codes into values, in place."""
    if zero is not None:
        codes.sub_(zero.view(-1, 1))
    return codes.mul_(scale.view(-1, 1))


def _best(values: Tensor, candidates: list[Fit], bits: int, space: Workspace) -> Fit:
    """For each group the fit of least squared error, the first one of equals."""
    best, best_zero = candidates[0]
    if len(candidates) == 1:
        return best, best_zero
    unit = best.abs()
    least = torch.full_like(best, torch.inf)
    for scale, zero in candidates:
        rounded = _round(values, scale, zero, bits, space)
        # In units of the first scale: squares of tiny weights would vanish in float32.
        error = _decode(rounded, scale, zero).sub_(values).div_(unit.view(-1, 1)).square_().sum(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
        if best_zero is not None and zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best, best_zero
