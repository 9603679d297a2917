"""Clipping weights before they are rounded: the second half of AWQ (Lin et al. 2023, arXiv:2306.00978, section 3 and its code's `auto_clip`).

A few large weights make the steps of their group coarse. Clamp them, and the others are rounded better: worth it where the error of the group's
contribution to the output, sum over tokens of (x . (Q(clip(w)) - w))^2, becomes smaller. x are the columns of the group only.

That sum needs no tokens, only their second moment within the group: with d = Q(clip(w)) - w it is d' M d, M = sum of x x'. M is a sum, so it adds
up over rows and devices; one matrix [group, group] for each group is all that is kept.

What it trades away: groups are judged one by one, errors of different groups that cancel or add up are not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.methods.rtn import shared_outer
from qwench.methods.straight_through import nearest_values
from qwench.numerics import Scheme

ROWS = 512
"""Rows of a weight that are judged at once."""


@dataclass(frozen=True)
class Clipping:
    """What a search found.

    Attributes:
        limits: float32 [out, groups], the largest magnitude that stays; the group's own where nothing beats it.
        before, after: sums of the groups' squared output errors, without and with the limits.
        clipped_share: of all groups.
    """

    limits: Tensor
    before: float
    after: float
    clipped_share: float


class GroupMoments:
    """Sum over all tokens of x x' within each group of a weight's columns.

    Args:
        columns: of the weight.
        group: columns of a group; None: the whole row is one.

    Attributes:
        sums: float32 [groups, group, group].
    """

    def __init__(self, columns: int, group: int | None, device: torch.device | str = "cpu") -> None:
        width = group or columns
        self.sums = torch.zeros(columns // width, width, width, device=device)

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Take in tokens [..., columns] as the weight reads them."""
        groups, width, _ = self.sums.shape
        by_group = inputs.reshape(-1, groups, width).to(torch.float32).transpose(0, 1)
        self.sums.baddbmm_(by_group.transpose(1, 2), by_group)


@torch.no_grad()
def search_limits(
    weight: Tensor,
    scheme: Scheme,
    moments: Tensor,
    outer: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    points: int = 20,
    deepest: float = 0.5,
) -> Clipping:
    """The limit of each group that makes its output error smallest, the widest one of equals.

    Args:
        weight: [out, in], smoothed where it will be.
        moments: see `GroupMoments`, of the inputs that go with it.
        outer, scale_dtype: as in `round_to_nearest`. The NVFP4 divisor is that of the unclipped fused set.
        points: limits are the group's largest magnitude times 1 - i / points ...
        deepest: ... as long as that is not below 1 - deepest.
    """
    values = weight.to(moments)
    outer = shared_outer([weight.cpu()], scheme) if outer is None else outer
    largest = values.view(len(values), len(moments), -1).abs().amax(-1)
    best, least = largest, torch.full_like(largest, torch.inf)
    before = least
    for step in range(int(points * deepest) + 1):
        limits = largest * (1 - step / points)
        error = _output_error(values, clipped(values, limits), scheme, moments, outer, scale_dtype)
        before = error if step == 0 else before
        better = error < least
        best, least = torch.where(better, limits, best), torch.where(better, error, least)
    narrowed = (best < largest).to(torch.float32)
    return Clipping(best, float(before.double().sum()), float(least.double().sum()), float(narrowed.mean()))


def clipped(weight: Tensor, limits: Tensor) -> Tensor:
    """A weight [out, in] with every group clamped to +-limits [out, groups]; same dtype."""
    groups = weight.view(*limits.shape, -1)
    bounds = limits.to(groups).unsqueeze(-1)
    return torch.minimum(torch.maximum(groups, -bounds), bounds).view(weight.shape)


def _output_error(
    weight: Tensor, narrowed: Tensor, scheme: Scheme, moments: Tensor, outer: Tensor | None, scale_dtype: torch.dtype
) -> Tensor:
    """d' M d of every row and group, [out, groups]."""
    difference = nearest_values(narrowed, scheme, outer, scale_dtype).sub_(weight)
    by_group = difference.view(len(weight), len(moments), -1).transpose(0, 1)
    parts = [(torch.bmm(rows, moments) * rows).sum(-1) for rows in torch.split(by_group, ROWS, 1)]
    return torch.cat(parts, 1).T.contiguous()
