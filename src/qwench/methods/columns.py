"""Rounding matrices column by column with error feedback (see `feedback`), on any grid.

Rows of a matrix do not know of each other. They are taken in chunks, transposed, and one buffer [in, chunk] is all the memory that is needed
on top of the second moment and its factor: before a column is rounded the buffer holds the weight, afterwards the error W - Q. Targets of a
block of columns come from one matrix product with all errors before it; within the block, from its own errors.

Letters in names: I input columns in the order of the steps (or of the matrix, where said), B columns of a block, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qwench.methods.feedback import Feedback
from qwench.methods.grids import Grid, Scales, choose, joined
from qwench.numerics import Quantized
from qwench.numerics.chunks import ErrorSums, error_sums, round_trip

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Elements of the working buffer: float32, so 64 MiB on a processor."""
CHUNK_ROWS = 128
"""Rows in a chunk are a multiple of this: an FP8 block is never cut."""
INNER = 16
"""Columns of a block that are brought up to date together: few enough that their errors stay in the cache."""
COMPARED_ROWS = 128
"""Rows of each chunk whose loss is compared with that of rounding."""


@dataclass
class Losses:
    """Squared output errors tr(E H E^T), summed over some rows of every matrix.

    Attributes:
        feedback: of what came out.
        rounding: of rounding to nearest in the same scheme.
        rows: that were looked at.
    """

    feedback: float = 0.0
    rounding: float = 0.0
    rows: int = 0


@dataclass
class ColumnRounder:
    """Rounds the matrices that share a second moment.

    Attributes:
        grid: what to round to.
        feedback: the factored second moment.
        second_II: the second moment itself, for the losses.
        block: columns whose targets are computed in one product, where scales are fixed; with updated scales it is one group.
        regrouped: whether groups are formed along the order of the steps (desc_act) and not side by side in the matrix.
        updated: whether a group's scale is decided when its first column is rounded, from its targets then, or beforehand from the weights. The
            steps must not mix groups.
        by_output: whether a search of scales minimizes the output error, or the squared error of the weights. The output error is known from the
            feedback: with fixed scales each column's squared error is weighted by what it costs; with updated ones the group is rounded with
            every candidate.
        losses: grow with every matrix.
    """

    grid: Grid
    feedback: Feedback
    second_II: Tensor
    block: int
    regrouped: bool
    updated: bool
    by_output: bool
    losses: Losses = field(default_factory=Losses)

    def __post_init__(self) -> None:
        self.width = self.grid.width(len(self.second_II))
        # With one group there is nothing to regroup, and what it is decided from has not been changed yet.
        self.regrouped, self.updated = self.regrouped and not self._one_group, self.updated and not self._one_group
        steps = torch.arange(len(self.second_II), device=self.second_II.device)
        self.group_of_step = (steps if self.regrouped else self.feedback.order_I) // self.width
        self.step_of_column = torch.argsort(self.feedback.order_I)

    @property
    def _one_group(self) -> bool:
        return self.width >= len(self.second_II)

    def matrix(self, weight: Tensor, outer: Tensor | None) -> Quantized:
        """One matrix [out, in] of any floating dtype, on any device; the result is on the processor."""
        codes, scales, zeros, sums = zip(*self._chunks(weight), strict=True)
        scheme = self.grid.scheme
        return Quantized(
            replace(scheme, ordered=True) if self.regrouped else scheme,
            torch.cat(codes),
            torch.cat(scales),
            None if zeros[0] is None else torch.cat(zeros),
            outer if scheme.kind == "nvfp4" else None,
            self.group_of_step[self.step_of_column].int().cpu() if self.regrouped else None,
            error=round_trip(list(sums), weight.numel()),
        )

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
        """A chunk in the order of the matrix -> errors W - Q in the order of the steps, codes and scales in the order of the matrix."""
        carry_II, error_IR = self.feedback.carry_II, weight_IR[self.feedback.order_I]
        fixed = None if self.updated else self._fit_all(error_IR if self.regrouped else weight_IR)
        fits, codes = [] if fixed is None else [fixed], []
        block = self.width if self.updated else self.block
        for start in range(0, len(error_IR), block):
            here = slice(start, min(start + block, len(error_IR)))
            target_BR = torch.addmm(error_IR[here], carry_II[here, :start], error_IR[:start])
            if fixed is None:
                fits.append(self._fit_group(error_IR[here], target_BR, here))
            groups = [0] * len(target_BR) if fixed is None else self.group_of_step[here].tolist()
            _round_block(self.grid, fits[-1], groups, carry_II[here, here], error_IR[here], target_BR)
            codes.append(self.grid.codes(target_BR))
        # Not every device permutes 8-bit floats; bytes it does.
        codes_IR = torch.cat(codes).view(torch.uint8)[self.step_of_column].view(codes[0].dtype)
        return error_IR, codes_IR, fixed or joined(fits, torch.argsort(self.group_of_step[:: self.width]))

    def _fit_all(self, weight_IR: Tensor) -> Scales:
        """Scales from the original weights."""
        cost_I = self.feedback.cost_I if self.regrouped else self.feedback.cost_I[self.step_of_column]
        return self.grid.fit(weight_IR, cost_I if self.by_output else None)

    def _fit_group(self, weight_BR: Tensor, target_BR: Tensor, here: slice) -> Scales:
        """Scales of one group from its weights as they have been moved before its first column is rounded.

        Targets are what columns are rounded towards once those before them are; what they have been moved to so far, as far as can be told,
        assumes that the others of the group will be rounded without error: F (moved - w) = target - w.
        """
        carry_BB = self.feedback.carry_II[here, here]
        shift_BR = target_BR - weight_BR
        moved_BR = weight_BR + torch.linalg.solve_triangular(carry_BB, shift_BR, upper=False, unitriangular=True)
        if not self.by_output or self.grid.scheme.search == "none":
            return self.grid.fit(moved_BR)
        cost_B1, within_BB = self.feedback.cost_I[here, None], torch.tril(carry_BB, -1)
        best, least_R = None, torch.empty(0)
        for candidate in self.grid.candidates(moved_BR.unsqueeze(0)):
            error_BR = weight_BR.clone()
            _round_block(self.grid, candidate, [0] * len(error_BR), carry_BB, error_BR, target_BR.clone())
            # target - q = (w - q) + what came from errors before the group + what came from errors within it
            missed_BR = torch.addmm(error_BR + shift_BR, within_BB, error_BR)
            loss_R = missed_BR.square_().mul_(cost_B1).sum(0)
            better_R = loss_R < least_R if best else torch.ones_like(loss_R, dtype=torch.bool)
            least_R = torch.where(better_R, loss_R, least_R) if best else loss_R
            best = choose(better_R, candidate, best) if best else candidate
        assert best is not None
        return best

    def _compare(self, weight_IR: Tensor, error_IR: Tensor) -> None:
        """Adds to the losses what some rows lose, and what they would lose by rounding."""
        self.losses.feedback += _loss(error_IR[self.step_of_column], self.second_II)
        self.losses.rounding += _loss(weight_IR - self.grid.rounded(weight_IR.contiguous()), self.second_II)
        self.losses.rows += weight_IR.shape[1]


def _round_block(grid: Grid, scales: Scales, groups: list[int], carry_BB: Tensor, error_BR: Tensor, target_BR: Tensor) -> None:
    """Rounds the columns of a block, in place: targets, which know the errors before the block, become levels; weights become errors.

    Args:
        groups: the row of `scales` for each column.
    """
    for first in range(0, len(target_BR), INNER):
        inner_BR = target_BR[first : first + INNER]
        inner_BR.addmm_(carry_BB[first : first + INNER, :first], error_BR[:first])
        for step, target_R in enumerate(inner_BR, first):
            target_R.addmv_(error_BR[first:step].T, carry_BB[step, first:step])
            scale_R = scales.scale_GR[groups[step]]
            zero_R = None if scales.zero_GR is None else scales.zero_GR[groups[step]]
            target_R.div_(scale_R)
            level_R = grid.nearest(target_R if zero_R is None else target_R.add_(zero_R))
            error_BR[step].addcmul_(level_R if zero_R is None else level_R - zero_R, scale_R, value=-1)


def _loss(error_IR: Tensor, second_II: Tensor) -> float:
    """tr(E H E^T)."""
    error_IR = error_IR.to(second_II.dtype)
    return float((second_II @ error_IR).mul_(error_IR).sum(dtype=torch.float64))


def _upright(transposed: Tensor) -> Tensor:
    """Rows first, contiguous, on the processor."""
    return transposed.T.contiguous().cpu()
