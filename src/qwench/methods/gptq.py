"""GPTQ: rounding column by column, where later columns make up for the errors of earlier ones.

Frantar et al. 2022, arXiv:2210.17323. The calibration data is seen only through the second moment of the inputs, H = sum x x^T, and the
result has the least squared output error that rounding one column after the other can reach (see `feedback` for the mathematics). The
feedback does not care what it rounds to: all schemes go through one `Grid`.

Matrices that read the same input share H. Those that engines fuse also share one order of columns and, in NVFP4, one divisor, so the whole
set is quantized in one call.

Rows do not know of each other. They are taken in chunks, transposed, and one buffer [in, chunk] is all the memory that is needed on top of H
and its factor: before a column is rounded the buffer holds the weight, afterwards the error. Targets of a block of columns come from one
matrix product with all errors before it; within the block, from its own errors.

What it trades away: it fits the calibration inputs. With fewer tokens than columns H is singular, the damping decides, and rounding to
nearest may be the better choice; the caller says what is enough (`enough`), and the report says what was done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qwench.methods.feedback import GREATEST_DAMPING, Feedback, Order, feedback
from qwench.methods.grids import Grid, Scales
from qwench.methods.rtn import round_to_nearest, shared_outer
from qwench.numerics import Quantized, Scheme
from qwench.numerics.chunks import ErrorSums, error_sums, round_trip

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Elements of the working buffer: float32, so 64 MiB on a processor."""
CHUNK_ROWS = 128
"""Rows in a chunk are a multiple of this: an FP8 block is never cut."""
INNER = 16
"""Columns of a block that are brought up to date together: few enough that their errors stay in the cache."""
COMPARED_ROWS = 128
"""Rows of each chunk whose loss is compared with that of rounding."""


@dataclass(frozen=True)
class GptqOptions:
    """How GPTQ is done.

    Attributes:
        damping: share of the mean diagonal of H that is added to it; more where H is not positive definite.
        block: columns whose targets are computed in one matrix product; changes the speed, not the result.
        order: `none`: columns as they are. `static`: those of the largest inputs first; groups keep their columns, so a file does not show it.
            `dynamic` (desc_act): the same order, and groups are formed along it: large inputs share scales; the file must hold `g_idx`.
        scales: `fixed`: from the original weights. `updated`: from what feedback has made of a group when its first column is rounded.
        importance: what a search of scales (`Scheme.search`) minimizes: the squared error of all columns alike, or weighted by the input's
            second moment (`diagonal`).
        precision: dtype in which H is factored.
    """

    damping: float = 0.01
    block: int = 128
    order: Order = "static"
    scales: Literal["fixed", "updated"] = "fixed"
    importance: Literal["none", "diagonal"] = "none"
    precision: torch.dtype = torch.float64


@dataclass(frozen=True)
class GptqReport:
    """What became of one set.

    Attributes:
        tokens: that the second moment was summed over.
        damping: that was used; more than asked for where the factorization needed it.
        dead: columns whose input was always zero; they were rounded plainly.
        loss: squared output error per token, sum over `compared_rows` rows; None where GPTQ was not done.
        rounding_loss: the same of rounding to nearest in the same scheme.
        compared_rows: rows that the losses are of: up to 128 of every chunk.
        fallback: why the set was rounded to nearest instead (scales by least squared error); None where it was not.
    """

    tokens: int
    damping: float
    dead: int
    loss: float | None
    rounding_loss: float | None
    compared_rows: int
    fallback: str | None = None

    @property
    def relative(self) -> float | None:
        """Loss over the loss of rounding to nearest."""
        return self.loss / self.rounding_loss if self.loss is not None and self.rounding_loss else None


def contradiction(options: GptqOptions, scheme: Scheme) -> str | None:
    """Why a scheme cannot be had with these options, or None."""
    if not 0 <= options.damping <= GREATEST_DAMPING:
        return f"damping {options.damping} is not within 0..{GREATEST_DAMPING:g}"
    if options.block < 1:
        return f"a block of {options.block} columns cannot be"
    if options.order == "dynamic" and scheme.kind != "int":
        return f"{scheme.label} has no place for the order of columns: it goes with the orders none and static"
    if options.order == "static" and options.scales == "updated" and (scheme.group or scheme.block):
        return "with the order static a group is not rounded in one go, so its scale cannot be updated: use fixed scales"
    return None


def gptq(
    weights: Sequence[Tensor],
    second: Tensor,
    tokens: int,
    scheme: Scheme,
    options: GptqOptions | None = None,
    *,
    outer: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    enough: int = 1,
) -> tuple[list[Quantized], GptqReport]:
    """Quantizes matrices that read the same input.

    Args:
        weights: the members of a fused set, [out_i, in] each, any floating dtype and device.
        second: sum over tokens of x x^T, [in, in], float32 or float64. All arithmetic is done on its device; it is not changed.
        tokens: how many were summed.
        scheme: one that `numerics.complaint` has nothing against for these shapes, and `contradiction` nothing with these options.
        outer: `nvfp4`: the divisor, where it is shared with matrices that are not among `weights`; None: of these.
        scale_dtype: what `int` and `fp8` scales are stored in.
        enough: with fewer tokens than this the set is rounded to nearest, with scales of least squared error, and the report says so.

    Returns:
        One result per member, on the processor, and what was done. With the order `dynamic` all members have one `group_of_column`.
    """
    options = options or GptqOptions()
    assert (wrong := contradiction(options, scheme)) is None, wrong
    assert all(weight.shape[1] == len(second) for weight in weights)
    outer = outer if outer is not None else shared_outer(weights, scheme)
    factored = feedback(second, options.order, options.damping, options.precision) if tokens >= max(1, enough) else None
    if factored is None:
        report = GptqReport(tokens, 0.0, 0, None, None, 0, _reason(tokens, enough))
        return [_best_rounding(weight, scheme, outer, scale_dtype) for weight in weights], report
    importance = torch.diagonal(second).float() if options.importance == "diagonal" else None
    rounder = _Rounder(Grid(scheme, scale_dtype, 1.0 if outer is None else float(outer)), factored, options, second, importance)
    results = [rounder.matrix(weight, outer) for weight in weights]
    loss, rounding_loss = rounder.loss / tokens, rounder.rounding_loss / tokens
    return results, GptqReport(tokens, factored.damping, factored.dead, loss, rounding_loss, rounder.compared_rows)


def _reason(tokens: int, enough: int) -> str:
    if tokens < max(1, enough):
        return f"{tokens} tokens were seen, {max(1, enough)} are wanted"
    return "the second moment of the inputs is zero, not finite or not positive"


def _best_rounding(weight: Tensor, scheme: Scheme, outer: Tensor | None, scale_dtype: torch.dtype) -> Quantized:
    """Rounding to nearest with the scales of least squared error, under the scheme that was asked for."""
    searched = scheme if scheme.kind == "fp8" or scheme.search != "none" else replace(scheme, search="mse")
    return replace(round_to_nearest(weight, searched, outer, scale_dtype), scheme=scheme)


class _Rounder:
    """Rounds matrices with one feedback and counts the losses. Letters: I input columns, R rows of a chunk, B columns of a block."""

    def __init__(
        self, grid: Grid, factored: Feedback, options: GptqOptions, second_II: Tensor, importance_I: Tensor | None
    ) -> None:
        self.grid, self.feedback, self.second_II = grid, factored, second_II
        columns = len(second_II)
        self.width = grid.width(columns)
        self.updated = options.scales == "updated" and self.width < columns
        self.block = self.width if self.updated else options.block
        self.regrouped = options.order == "dynamic" and self.width < columns
        steps = torch.arange(columns, device=second_II.device)
        # Where groups follow the order, a group is what is rounded in one go; else it is what stands side by side in the matrix.
        self.group_of_step = (steps if self.regrouped else factored.order_I) // self.width
        if importance_I is not None and self.regrouped:
            importance_I = importance_I[factored.order_I]
        self.importance_I = importance_I
        self.loss = self.rounding_loss = 0.0
        self.compared_rows = 0

    def matrix(self, weight: Tensor, outer: Tensor | None) -> Quantized:
        """One matrix [out, in]."""
        codes, scales, zeros, sums = zip(*self._chunks(weight), strict=True)
        return Quantized(
            self.grid.scheme,
            torch.cat(codes),
            torch.cat(scales),
            None if zeros[0] is None else torch.cat(zeros),
            outer if self.grid.scheme.kind == "nvfp4" else None,
            self._group_of_column() if self.regrouped else None,
            error=round_trip(list(sums), weight.numel()),
        )

    def _group_of_column(self) -> Tensor:
        found = torch.empty_like(self.group_of_step, dtype=torch.int32)
        found[self.feedback.order_I] = self.group_of_step.int()
        return found.cpu()

    def _chunks(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None, ErrorSums]]:
        """Codes, scales, zero points (as they are stored) and error of the rows, chunk by chunk."""
        elements = CHUNK_ELEMENTS.get(self.second_II.device.type, CHUNK_ELEMENTS["cuda"])
        height = max(1, elements // (weight.shape[1] * CHUNK_ROWS)) * CHUNK_ROWS
        for part in torch.split(weight, height):
            weight_IR = part.to(self.second_II.device).float().T.contiguous()
            error_IR, codes_IR, scales = self._round(weight_IR)
            self._compare(weight_IR[:, :COMPARED_ROWS], error_IR[:, :COMPARED_ROWS])
            zeros = None if scales.zero_GR is None else _upright(scales.zero_GR.to(torch.int8))
            yield _upright(codes_IR), _upright(scales.stored), zeros, error_sums(error_IR, weight_IR)

    def _round(self, weight_IR: Tensor) -> tuple[Tensor, Tensor, Scales]:
        """Errors W - Q in the order of the steps, codes in the order of the columns, and scales."""
        order_I, carry_II = self.feedback.order_I, self.feedback.carry_II
        work_IR = weight_IR[order_I]
        fixed = None if self.updated else self.grid.fit(work_IR if self.regrouped else weight_IR, self.importance_I)
        fits, codes = [] if fixed is None else [fixed], []
        for start in range(0, len(work_IR), self.block):
            stop = min(start + self.block, len(work_IR))
            target_BR = torch.addmm(work_IR[start:stop], carry_II[start:stop, :start], work_IR[:start])
            if fixed is None:
                fits.append(self.grid.fit(target_BR, None if self.importance_I is None else self.importance_I[start:stop]))
            self._round_block(work_IR, target_BR, start, fits[-1], fixed is None)
            codes.append(self.grid.codes(target_BR))
        # Not every device permutes 8-bit floats; bytes it does.
        codes_IR = torch.cat(codes).view(torch.uint8)[torch.argsort(order_I)].view(codes[0].dtype)
        return work_IR, codes_IR, _joined(fits)

    def _round_block(self, work_IR: Tensor, target_BR: Tensor, start: int, scales: Scales, one_group: bool) -> None:
        """Rounds the columns of a block: targets become levels, weights become errors. Targets know the errors before `start`."""
        carry_II, groups = self.feedback.carry_II, [0] * len(target_BR)
        if not one_group:
            groups = self.group_of_step[start : start + len(target_BR)].tolist()
        for inner in range(start, start + len(target_BR), INNER):
            upcoming = target_BR[inner - start : inner - start + INNER]
            upcoming.addmm_(carry_II[inner : inner + INNER, start:inner][: len(upcoming)], work_IR[start:inner])
            for step, target_R in enumerate(upcoming, inner):
                target_R.addmv_(work_IR[inner:step].T, carry_II[step, inner:step])
                group = groups[step - start]
                scale_R, zero_R = scales.scale_GR[group], None if scales.zero_GR is None else scales.zero_GR[group]
                target_R.div_(scale_R)
                level_R = self.grid.nearest(target_R if zero_R is None else target_R.add_(zero_R))
                work_IR[step].addcmul_(level_R if zero_R is None else level_R - zero_R, scale_R, value=-1)

    def _compare(self, weight_IR: Tensor, error_IR: Tensor) -> None:
        """Adds to the losses what some rows lose, and what they would lose by rounding."""
        in_place_IR = torch.empty_like(error_IR).index_copy_(0, self.feedback.order_I, error_IR)
        self.loss += _loss(in_place_IR, self.second_II)
        self.rounding_loss += _loss(weight_IR - self.grid.rounded(weight_IR.contiguous()), self.second_II)
        self.compared_rows += weight_IR.shape[1]


def _loss(error_IR: Tensor, second_II: Tensor) -> float:
    """tr(E H E^T)."""
    error_IR = error_IR.to(second_II.dtype)
    return float((second_II @ error_IR).mul_(error_IR).sum(dtype=torch.float64))


def _joined(fits: list[Scales]) -> Scales:
    if len(fits) == 1:
        return fits[0]
    zeros = [fit.zero_GR for fit in fits if fit.zero_GR is not None]
    stored, scale_GR = torch.cat([fit.stored for fit in fits]), torch.cat([fit.scale_GR for fit in fits])
    return Scales(stored, scale_GR, torch.cat(zeros) if zeros else None)


def _upright(transposed: Tensor) -> Tensor:
    """Rows first, contiguous, on the processor."""
    return transposed.T.contiguous().cpu()
