"""Error feedback: how the rounding error of one input column is made up for by the columns that are rounded after it.

Rounding W [out, in] to Q costs, on inputs with second moment H = sum x x^T, the squared output error tr((W - Q) H (W - Q)^T). Frantar et al.
2022 (GPTQ, arXiv:2210.17323) round column by column and, after each, move the columns that are left to where they best make up for it. They
do it with rows of the Cholesky factor of H^-1. Chee et al. 2023 (QuIP, arXiv:2307.13304) show that the same numbers come out of a factor of H
itself. With H = F^T D F, F lower triangular with ones on its diagonal, D diagonal,

    tr(E H E^T) = sum_j D_j |E F^T|_j^2,   E = W - Q

so that column j, rounded when all errors before it are known, is best rounded towards

    target_j = w_j + sum_{k<j} F_jk (w_k - q_k)

and what is left costs D_j (target_j - q_j)^2. No inverse, a third of the work, and no column is ever updated: each target is computed once,
from errors that are final. Nothing can be counted twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Order = Literal["none", "static", "grouped", "dynamic"]

GREATEST_DAMPING = 1.0
"""Share of the mean diagonal beyond which a factorization is given up: what is left then is nearly plain rounding."""


@dataclass(frozen=True)
class Feedback:
    """A second moment, factored in the order in which columns are rounded. I: input columns.

    Attributes:
        order_I: int64, the column that is rounded at each step.
        carry_II: float32, row j: what share of the error of each earlier step (k < j) column j takes over. Other entries mean nothing.
        cost_I: what a squared error costs at each step (D above), float32, 1 on average.
        damping: what was added to the diagonal, as a share of its mean.
        dead: columns whose input was always zero.
    """

    order_I: Tensor
    carry_II: Tensor
    cost_I: Tensor
    damping: float
    dead: int


def feedback(
    second_II: Tensor, order: Order, width: int, damping: float, precision: torch.dtype = torch.float64
) -> Feedback | None:
    """Factors a second moment.

    Dead columns get the mean diagonal: nothing is known about them, so they are rounded plainly, take over no error and pass none on. (The
    original code sets their weights to zero; an input that calibration did not see would then be cut off.)

    Args:
        second_II: sums of x x^T, symmetric, any scale; not overwritten.
        order: `none`: columns as they are. `static`, `dynamic`: those of the largest inputs first, while most columns are left to make up for
            them. `grouped`: the groups of the largest inputs first, and so within each group.
        width: columns in a group, only looked at for `grouped`.
        damping: share of the mean diagonal that is added to it. Taken times 4 until the factorization succeeds.
        precision: of the factorization; the result is float32.

    Returns:
        None where there is nothing to go by: the moment is zero or not finite, or even much damping does not help.
    """
    diagonal = torch.diagonal(second_II)
    mean = float(diagonal.double().mean())
    # A sum is finite only if all of its terms are.
    if not mean > 0 or not bool(second_II.sum(dtype=torch.float64).isfinite()):
        return None
    dead = diagonal <= 0
    order_I = _order(diagonal, order, width)
    while damping <= GREATEST_DAMPING:
        lower = _factor(second_II, order_I.flip(0), dead, damping * mean, mean, precision)
        if lower is not None:
            pivot_I = torch.diagonal(lower).clone()
            cost_I = pivot_I.square().flip(0)
            carry_II = lower.div_(pivot_I).float().T.flip(0, 1).contiguous()
            return Feedback(order_I, carry_II, (cost_I / cost_I.mean()).float(), damping, int(dead.sum()))
        damping = max(4 * damping, 1e-3)
    return None


def _order(diagonal_I: Tensor, order: Order, width: int) -> Tensor:
    """The column to round at each step. Equals stay in their order, and a group that is not full stays last."""
    columns = torch.arange(len(diagonal_I), device=diagonal_I.device)
    if order == "none":
        return columns
    if order != "grouped":
        return torch.argsort(diagonal_I, descending=True, stable=True)
    full = len(columns) // width * width
    whole_GW, rest_I = diagonal_I[:full].view(-1, width), torch.argsort(diagonal_I[full:], descending=True, stable=True)
    within_GW = torch.argsort(whole_GW, dim=1, descending=True, stable=True) + columns[:full:width, None]
    largest_first = torch.argsort(whole_GW.mean(1), descending=True, stable=True)
    return torch.cat([within_GW[largest_first].flatten(), rest_I + full])


def _factor(
    second_II: Tensor, backward_I: Tensor, dead_I: Tensor, extra: float, mean: float, precision: torch.dtype
) -> Tensor | None:
    """The lower Cholesky factor of the damped moment with its columns in backward order; None if it is not positive definite.

    Of the matrix turned round, the lower factor turned round is an upper one: H = U U^T. Its columns over their pivots are the rows of F.
    """
    damped = second_II[backward_I[:, None], backward_I].to(precision)
    damped.diagonal().add_(extra).masked_fill_(dead_I[backward_I], mean)
    lower, info = torch.linalg.cholesky_ex(damped)
    return lower if int(info) == 0 and bool(torch.diagonal(lower).isfinite().all()) else None
