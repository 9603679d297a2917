"""Means with a standard error, where the samples are not independent.

Tokens of one document are alike, so a standard error over tokens is far too small. Documents are independent: they are the clusters. With S_d the
sum of a measure over the n_d tokens of document d, N = sum n_d and D documents, the mean over tokens is a ratio of two sums over documents,

    m = sum_d S_d / N                                       SE(m) = sqrt( D / (D - 1) * sum_d (S_d - m n_d)^2 ) / N

which is the cluster-robust standard error (Liang and Zeger 1986; the ratio estimator of Cochran, Sampling Techniques, ch. 6). Where all documents are
equally long it is the plain standard error of the mean of the documents' means.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qwench.errors import TextError


class Mean(NamedTuple):
    """A mean over tokens and its standard error over documents."""

    mean: float
    standard_error: float


def clustered_mean(values: Tensor, documents: Tensor) -> Mean:
    """The mean of `values` with a standard error over documents; see the module's formula.

    Args:
        values: [tokens], any real or boolean dtype; sums are float64.
        documents: int64 [tokens], the document of each token, any numbers.

    Raises:
        TextError: fewer than two documents; one document says nothing about the spread between documents.
    """
    assert values.shape == documents.shape and values.dim() == 1
    labels, cluster = torch.unique(documents, return_inverse=True)
    count = len(labels)
    if count < 2:
        raise TextError(f"{count} document gives no standard error", "evaluate on at least 2 documents")
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, cluster, values.to(torch.float64))
    sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, cluster, torch.ones_like(values, dtype=torch.float64))
    mean = sums.sum() / sizes.sum()
    spread = (sums - mean * sizes).square().sum() * (count / (count - 1))
    return Mean(float(mean), float(spread.sqrt() / sizes.sum()))


def exponential(mean: Mean) -> Mean:
    """exp of a mean, as perplexity is of the negative log-likelihood; its standard error to first order (delta method): exp(m) SE(m)."""
    value = math.exp(mean.mean)
    return Mean(value, value * mean.standard_error)


def quantile(values: Tensor, share: float) -> float:
    """The smallest value such that at least `share` of all values are no larger: one that occurred, never an interpolation."""
    assert 0 < share <= 1 and values.numel() > 0
    rank = math.ceil(round(share * values.numel(), 9))  # 0.999 * 1000 must be 999, not 999.0000001
    return float(values.flatten().kthvalue(max(rank, 1)).values)
