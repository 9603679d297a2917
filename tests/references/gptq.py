"""Optimal brain quantization with a fixed order (Frantar et al. 2022, arXiv:2210.17323, section 3), column by column in float64.

After each column the weights that are left move to where they best make up for its error: w -= (w_j - q_j) / [H^-1]_jj * [H^-1]_j:, with the
inverse computed anew for what is left, as the textbook has it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Values = np.ndarray


def column_by_column(
    weight: Values, second: Values, order: list[int], round_column: Callable[[int, Values, Values], Values], damping: float
) -> tuple[Values, Values]:
    """Quantized values [out, in], and the targets [out, in] that each column was rounded towards.

    Args:
        round_column: (step, target of the column at that step [out], all weights as they are then [out, in]) -> values [out].
    """
    second = second.astype(np.float64).copy()
    dead = np.diag(second) == 0
    mean = np.diag(second).mean()
    second[np.diag_indices_from(second)] += np.where(dead, mean, damping * mean)
    moved, values = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    targets = np.zeros(weight.shape)
    left = list(order)
    for step, column in enumerate(order):
        inverse = np.linalg.inv(second[np.ix_(left, left)])
        targets[:, column] = moved[:, column]
        values[:, column] = round_column(step, moved[:, column].copy(), moved)
        error = (moved[:, column] - values[:, column]) / inverse[0, 0]
        moved[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return values, targets


def updated_twice(
    weight: Values, second: Values, round_column: Callable[[Values, int], Values], damping: float, block: int
) -> Values:
    """The trap that mlx-lm fell into: columns past a block get the block's errors at every step, and all of them again at its end."""
    size = len(second)
    inverse = np.linalg.inv(second + damping * np.diag(second).mean() * np.eye(size))
    upper = np.linalg.cholesky(inverse).T
    moved, values = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    for start in range(0, size, block):
        stop, errors = min(start + block, size), np.zeros((len(weight), block))
        for j in range(start, stop):
            values[:, j] = round_column(moved[:, j], j)
            errors[:, j - start] = (moved[:, j] - values[:, j]) / upper[j, j]
            moved[:, j:] -= np.outer(errors[:, j - start], upper[j, j:])
        moved[:, stop:] -= errors[:, : stop - start] @ upper[start:stop, stop:]
    return values


def loss(weight: Values, values: Values, second: Values) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    error = weight.astype(np.float64) - values
    return float(np.trace(error @ second @ error.T))
