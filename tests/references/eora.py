"""EoRA as its paper has it (Liu et al. 2024, arXiv:2410.21271): into the eigenspace of the inputs, truncate, and back."""

from __future__ import annotations

import numpy as np


def eigenspace(error: np.ndarray, second: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [r, in] and B [out, r], so that B A corrects `error` [out, in], float64."""
    values, vectors = np.linalg.eigh(second.astype(np.float64))
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps * 100
    roots = np.sqrt(values[kept])
    into = vectors[:, kept] * roots
    back = (vectors[:, kept] / roots).T
    left, sizes, right = np.linalg.svd(error.astype(np.float64) @ into, full_matrices=False)
    rank = min(rank, len(sizes))
    return np.sqrt(sizes[:rank])[:, None] * (right[:rank] @ back), left[:, :rank] * np.sqrt(sizes[:rank])


def plain(error: np.ndarray, rank: int) -> np.ndarray:
    """The best correction of rank r that does not look at inputs: the truncated singular value decomposition."""
    left, sizes, right = np.linalg.svd(error.astype(np.float64), full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank]


def loss(error: np.ndarray, second: np.ndarray) -> float:
    """tr(E H E^T)."""
    return float(np.einsum("oi,ij,oj->", error.astype(np.float64), second.astype(np.float64), error.astype(np.float64)))
