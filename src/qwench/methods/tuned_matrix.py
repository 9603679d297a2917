"""One weight whose rounding is tuned by signed gradient descent: what AutoRound (`qwench.methods.autoround`) does to each matrix of a block.

Gradients and codes are worked out by portions of rows, so that the thirty or so temporaries of a rounding are never as large as the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qwench.methods.straight_through import (
    Ranges,
    Rounded,
    Tuning,
    centred,
    ranges_of,
    round_tuned,
    tunable_complaint,
    untuned,
)
from qwench.numerics import Quantized, RoundTrip, Scheme, complaint, outer_scale

ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Weights whose rounding is differentiated at once: on a processor so few that the temporaries stay in its cache, which is three times as fast as 1 << 22."""


def tuning_complaint(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """Why a weight of this shape cannot be tuned in this scheme, or None."""
    return tunable_complaint(scheme) or complaint(scheme, shape)


class TunedMatrix:
    """One weight while it is tuned.

    Args:
        weight: [out, in]; tuned where it is.
        scheme: one that `tuning_complaint` has nothing against.
        outer: float32 [1], `nvfp4` only, the divisor of the fused set; None: of this matrix alone.
        scale_dtype: what `int` scales are stored in.
        start: codes and scales to start from, in this scheme (`search` aside), without an order of its own; None: rounding to nearest.

    Attributes:
        tuning: offset and factors as they are now; `start` at first.
    """

    def __init__(
        self,
        weight: Tensor,
        scheme: Scheme,
        outer: Tensor | None,
        scale_dtype: torch.dtype,
        start: Quantized | None = None,
    ) -> None:
        assert (wrong := tuning_complaint(scheme, tuple(weight.shape))) is None, wrong
        assert start is None or start.group_of_column is None
        self.weight, self.scheme, self.dtype = weight, scheme, scale_dtype
        if scheme.kind == "nvfp4" and outer is None:
            outer = outer_scale(weight.abs().amax().cpu()) if start is None else start.outer
        self.outer, self.start = outer, start
        self.tuning = untuned(weight, scheme)
        # Scales that were found by a search, or from what error feedback made of a group, may have to grow.
        self.most = 1.0 if start is None else 2.0
        self.ranges: Ranges | None = None
        if start is not None:
            low, high = ranges_of(start)
            self.ranges = low.to(weight.device), high.to(weight.device)

    def parts(self) -> Iterator[slice]:
        """Rows in portions of about `ELEMENTS`."""
        elements = ELEMENTS.get(self.weight.device.type, ELEMENTS["cuda"])
        height = max(1, elements // self.weight.shape[1])
        for top in range(0, len(self.weight), height):
            yield slice(top, top + height)

    @torch.no_grad()
    def values(self, into: Tensor) -> None:
        """Writes what the codes stand for now, [out, in]: bit for bit that of `quantized`."""
        for rows in self.parts():
            into[rows] = self._round(rows, self._part(rows)).values()

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """Codes and scales now, on the CPU."""
        made = [
            self._round(rows, self._part(rows)).quantized(self.weight[rows], self.scheme, self.dtype) for rows in self.parts()
        ]
        zeros = [part.zeros for part in made if part.zeros is not None]
        return Quantized(
            self.scheme,
            torch.cat([part.codes for part in made]),
            _join([part.scales for part in made]),
            torch.cat(zeros) if zeros else None,
            outer=made[0].outer,
        )

    def step(self, gradient: Tensor, rate: float, range_rate: float) -> None:
        """One step of signed descent, from the loss's gradient with respect to `values`, [out, in]."""
        for rows in self.parts():
            part = self._part(rows)
            leaves = [t.detach().requires_grad_() for t in (part.offset, part.low, part.high)]
            with torch.enable_grad():
                values = self._round(rows, Tuning(*leaves)).values()
            slopes = torch.autograd.grad(values, leaves, gradient[rows].to(torch.float32), allow_unused=True)
            for parameter, slope, speed, bounds in zip(
                (part.offset, part.low, part.high),
                slopes,
                (rate, range_rate, range_rate),
                ((-0.5, 0.5), (0, self.most), (0, self.most)),
                strict=True,
            ):
                if slope is not None:  # NVFP4 has no use for `low`
                    parameter.sub_(slope.sign_(), alpha=speed).clamp_(*bounds)

    def _part(self, rows: slice) -> Tuning:
        return Tuning(self.tuning.offset[rows], self.tuning.low[rows], self.tuning.high[rows])

    def _round(self, rows: slice, tuning: Tuning) -> Rounded:
        if self.start is None or self.ranges is None:
            return round_tuned(self.weight[rows], self.scheme, tuning, self.outer, self.dtype)
        weight = centred(self.weight[rows], rows_of(self.start, rows, self.weight.device))
        ranges = self.ranges[0][rows], self.ranges[1][rows]
        return round_tuned(weight, self.scheme, tuning, self.outer, self.dtype, ranges)


def rows_of(quantized: Quantized, rows: slice, device: torch.device) -> Quantized:
    """Some rows of a quantized matrix, on a device."""
    zeros, outer = quantized.zeros, quantized.outer
    return replace(
        quantized,
        codes=quantized.codes[rows].to(device),
        scales=quantized.scales[rows].to(device),
        zeros=None if zeros is None else zeros[rows].to(device),
        outer=None if outer is None else outer.to(device),
    )


def round_trip_of(weight: Tensor, quantized: Quantized) -> RoundTrip:
    """How far the values of `quantized` lie from a weight [out, in]."""
    original = weight.detach().to("cpu", torch.float32)
    error = quantized.dequantize().sub_(original)
    size = float(original.double().norm())
    relative = float(error.double().norm()) / size if size > 0 else 0.0
    return RoundTrip(float(error.abs().mean(dtype=torch.float64)), float(error.abs().max()), relative)


def _join(scales: list[Tensor]) -> Tensor:
    """Scales of consecutive rows; FP8 numbers are joined as bytes, for which every version has a kernel."""
    if scales[0].dtype is not torch.float8_e4m3fn:
        return torch.cat(scales)
    return torch.cat([part.view(torch.uint8) for part in scales]).view(torch.float8_e4m3fn)
