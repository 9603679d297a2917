"""Images in a row of tokens: how many tokens they take, and where these stand.

Positions are M-RoPE's: text counts up in time, height and width alike; the tokens of an image share one time, and count rows and columns up from it; text goes on
behind the larger of the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Grid = tuple[int, int, int]
"""Patches of an image: frames, rows, columns."""


def tokens_of(grid: Grid, merge: int) -> int:
    """Tokens that an image takes in a row; `merge` patches in each direction make one."""
    return grid[0] * grid[1] * grid[2] // merge**2


def row_positions(length: int, images: Sequence[tuple[int, Grid]], merge: int) -> Tensor:
    """Where the tokens of a row stand, int64 [3, length] (time, height, width).

    Args:
        images: where each image begins in the row, ascending, and its patches.
        merge: see `tokens_of`.
    """
    parts, place, position = list[Tensor](), 0, 0
    for start, grid in images:
        parts.append(torch.arange(start - place).expand(3, -1) + position)
        position += start - place
        frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
        axes = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
        parts.append(torch.stack(axes).flatten(1) + position)
        place, position = start + tokens_of(grid, merge), position + max(rows, columns)
    parts.append(torch.arange(length - place).expand(3, -1) + position)
    return torch.cat(parts, 1)
