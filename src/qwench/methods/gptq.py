"""GPTQ: rounding column by column, where later columns make up for the errors of earlier ones.

Frantar et al. 2022, arXiv:2210.17323. The calibration data is seen only through the second moment of the inputs, H = sum x x^T, and the
result has the least squared output error that rounding one column after the other can reach (see `feedback` for the mathematics). The
feedback does not care what it rounds to: all schemes go through one `Grid`, column by column (see `columns`).

Matrices that read the same input share H. Those that engines fuse also share one order of columns and, in NVFP4, one divisor, so the whole
set is quantized in one call.

What it trades away: it fits the calibration inputs. With fewer tokens than columns H is singular, the damping decides, and rounding to
nearest may be the better choice; the caller says what is enough (`enough`), and the report says what was done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qwench.methods.columns import ColumnRounder
from qwench.methods.feedback import GREATEST_DAMPING, Order, feedback
from qwench.methods.grids import Grid
from qwench.methods.rtn import round_to_nearest, shared_outer
from qwench.numerics import Quantized, Scheme
from qwench.numerics.scheme import Search


@dataclass(frozen=True)
class GptqOptions:
    """How GPTQ is done.

    The defaults are what did best on inputs that had not been calibrated on, over the linear modules of a small trained model, at 4 bits.

    Attributes:
        damping: share of the mean diagonal of H that is added to it; more where H is not positive definite.
        block: columns whose targets are computed in one matrix product; changes the speed, not the result.
        order: `none`: columns as they are. `static`: those of the largest inputs first; groups keep their columns, so a file does not show it.
            `grouped`: the same, but group after group. `dynamic` (desc_act): the order of `static`, and groups are formed along it: large
            inputs share scales; only `int` files can hold the group of each column (`g_idx`), other schemes get what None gives. None: `grouped`
            for `int` and `nvfp4` where scales are searched (groups that are done one by one can be searched by the output), else `static`.
        scales: `fixed`: from the original weights. `updated`: from what feedback has made of a group when its first column is rounded; not with
            the order `static`, which has many groups half done. None: `updated` where the order allows it.
        search: how scales are searched where the scheme asks for none; what is returned has the scheme that was asked for.
        judge: what a search of scales minimizes: the squared error of the `weights`, or of the `output`.
        precision: dtype in which H is factored.
    """

    damping: float = 0.03
    block: int = 128
    order: Order | None = None
    scales: Literal["fixed", "updated"] | None = None
    search: Search = "none"
    judge: Literal["weights", "output"] = "output"
    precision: torch.dtype = torch.float64

    def order_for(self, scheme: Scheme) -> Order:
        """The order that a scheme gets."""
        if self.order is not None and (self.order != "dynamic" or scheme.kind == "int"):
            return self.order
        return "grouped" if scheme.search != "none" and scheme.kind in ("int", "nvfp4") else "static"

    def searched(self, scheme: Scheme) -> Scheme:
        """The scheme with the search that is done for it."""
        return replace(scheme, search=self.search) if scheme.search == "none" and scheme.kind != "fp8" else scheme

    def updates_scales(self, scheme: Scheme) -> bool:
        """Whether scales are decided group by group."""
        return self.scales == "updated" or (self.scales is None and self.order_for(scheme) != "static")


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
    if options.order_for(scheme) == "static" and options.updates_scales(scheme):
        return "the order static does not finish one group before the next, so scales cannot be updated: use fixed scales or grouped"
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
        One result per member, on the processor, and what was done. With the order `dynamic` all members have one `group_of_column`, and
        a scheme that is `ordered` (but where a row is one group, and in a fallback).
    """
    options = options or GptqOptions()
    asked, scheme = scheme, options.searched(scheme)
    assert (wrong := contradiction(options, scheme)) is None, wrong
    assert all(weight.shape[1] == len(second) for weight in weights)
    outer = outer if outer is not None else shared_outer(weights, scheme)
    grid = Grid(scheme, scale_dtype, 1.0 if outer is None else float(outer))
    order, factored = options.order_for(scheme), None
    if tokens >= max(1, enough):
        factored = feedback(second, order, grid.width(len(second)), options.damping, options.precision)
    if factored is None:
        report = GptqReport(tokens, 0.0, 0, None, None, 0, _reason(tokens, enough))
        return [replace(_best_rounding(weight, scheme, outer, scale_dtype), scheme=asked) for weight in weights], report
    updated, by_output = options.updates_scales(scheme), options.judge == "output"
    rounder = ColumnRounder(grid, factored, second, options.block, order == "dynamic", updated, by_output)
    results = [asking(rounder.matrix(weight, outer), asked) for weight in weights]
    loss, rounding_loss = rounder.losses.feedback / tokens, rounder.losses.rounding / tokens
    return results, GptqReport(tokens, factored.damping, factored.dead, loss, rounding_loss, rounder.losses.rows)


def asking(quantized: Quantized, asked: Scheme) -> Quantized:
    """A result under the search that was asked for; whether it is ordered is the result's own."""
    return replace(quantized, scheme=replace(asked, ordered=quantized.scheme.ordered))


def _reason(tokens: int, enough: int) -> str:
    if tokens < max(1, enough):
        return f"{tokens} tokens were seen, {max(1, enough)} are wanted"
    return "the second moment of the inputs is zero, not finite or not positive"


def _best_rounding(weight: Tensor, scheme: Scheme, outer: Tensor | None, scale_dtype: torch.dtype) -> Quantized:
    """Rounding to nearest with the scales of least squared error, under the scheme that was asked for."""
    searched = scheme if scheme.kind == "fp8" or scheme.search != "none" else replace(scheme, search="mse")
    return replace(round_to_nearest(weight, searched, outer, scale_dtype), scheme=scheme)
