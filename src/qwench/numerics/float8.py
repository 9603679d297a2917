"""FP8 E4M3: four exponent bits, three mantissa bits, largest 448, with one scale for a row or for a block of 128x128.

value = E4M3(code) * scale, scale = amax / 448, rounded to the dtype that will be stored before the codes are chosen. Rounding is to
nearest, ties to even, of the float32 quotient weight / scale, clamped to +-448.

Blocks at the lower and right edge of a matrix may be partial: they get a scale of their own, from the values that are there. A search of
scales is not offered: the steps of E4M3 grow with the values, so that a smaller range does not make them finer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwench.numerics.chunks import ErrorSums, Tile, Workspace, error_sums, round_trip, work_through
from qwench.numerics.quantized import Quantized
from qwench.numerics.scheme import Scheme

LARGEST = 448.0


def encode_fp8(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.bfloat16) -> Quantized:
    """Rounds a matrix [out, in] of any floating type to E4M3, scales in `scale_dtype`: [out, 1] or [ceil(out / 128), ceil(in / 128)]."""
    rows, columns = weight.shape
    height, width = scheme.block or (1, columns)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(math.ceil(rows / height), math.ceil(columns / width), dtype=scale_dtype)

    def work(tile: Tile, space: Workspace) -> ErrorSums:
        part = tile.of(weight)
        values = space.take("values", (part.shape[0], part.shape[1])).copy_(part)
        scale = fit_fp8(values, height, width, scale_dtype)
        scales[tile.rows.start // height :, tile.columns.start // width :][: scale.shape[0], : scale.shape[1]].copy_(scale)
        spread = _spread(scale.to(torch.float32), (part.shape[0], part.shape[1]), height, width)
        quotient = torch.div(values, spread, out=space.take("quotient", tuple(values.shape))).clamp_(-LARGEST, LARGEST)
        short = space.take("short", tuple(values.shape), torch.float8_e4m3fn).copy_(quotient)
        tile.of(codes).copy_(short)
        return error_sums(quotient.copy_(short).mul_(spread).sub_(values), values)

    return Quantized(
        scheme,
        codes,
        scales,
        error=round_trip(work_through(weight, work, height, width if scheme.block else None), weight.numel()),
    )


def decode_fp8(quantized: Quantized) -> Tensor:
    """The values of an FP8 matrix, float32 [out, in]."""
    codes = quantized.codes
    values = torch.empty(codes.shape, dtype=torch.float32)
    scale = quantized.row_scales().to(torch.float32)
    height, width = quantized.scheme.block or (1, codes.shape[1])

    def work(tile: Tile, space: Workspace) -> None:
        part = tile.of(values).copy_(tile.of(codes))
        here = scale[tile.rows.start // height :, tile.columns.start // width :]
        part.mul_(_spread(here, (part.shape[0], part.shape[1]), height, width))

    work_through(values, work, height, width if quantized.scheme.block else None)
    return values


def fit_fp8(values: Tensor, height: int, width: int, scale_dtype: torch.dtype) -> Tensor:
    """amax / 448 of each block of a tile, in `scale_dtype`, kept at its normal numbers and low enough that no code overflows."""
    rows, columns = values.shape
    down, across = math.ceil(rows / height), math.ceil(columns / width)
    if (down * height, across * width) != (rows, columns):
        values = torch.nn.functional.pad(values, (0, across * width - columns, 0, down * height - rows))
    amax = torch.amax(values.abs().view(down, height, across, width), dim=(1, 3))
    info = torch.finfo(scale_dtype)
    # 512 rather than 448: rounding the bound to the dtype must not lift it.
    return (amax / LARGEST).clamp_(info.tiny, min(info.max, torch.finfo(torch.bfloat16).max) / 512).to(scale_dtype)


def _spread(scale: Tensor, shape: tuple[int, int], height: int, width: int) -> Tensor:
    """Scales over a tile: [rows, 1] where a scale serves a row, else [rows, columns]."""
    if height == 1 and scale.shape[1] == 1:
        return scale[: shape[0]]
    down, across = math.ceil(shape[0] / height), math.ceil(shape[1] / width)
    wide = scale[:down, :across].repeat_interleave(width, 1)[:, : shape[1]]
    return wide.repeat_interleave(height, 0)[: shape[0]]
