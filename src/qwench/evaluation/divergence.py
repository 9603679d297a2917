"""How far the release's next-token distribution is from the source's, token by token.

    KL(p || q) = sum_v p_v (log p_v - log q_v),  p the source's distribution, q the release's, in nats.

Logits are made from normed hidden states a few positions at a time, so that [positions, vocabulary] stays bounded however large the vocabulary is.
Log-softmax is float32, sums over the vocabulary are float64. What rounding leaves below zero (some 1e-8) is set to zero: a divergence is not negative.
Per-token values are kept: quantiles are exact, and everything else follows from them.

The histogram's edges are the same for every release, four to a factor of ten, so that histograms can be laid over each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""Largest size of one [positions, vocabulary] tensor in float32; about six of them live at once."""

HISTOGRAM_EDGES: tuple[float, ...] = tuple(10 ** (exponent / 4) for exponent in range(-32, 9))
"""1e-8 to 100 nats."""

Logits = Callable[[Tensor], Tensor]
"""Normed hidden states [positions, hidden] to logits [positions, vocabulary]."""


@dataclass(frozen=True)
class TokenMeasures:
    """Per-token values over all rows, and what the two models would say next.

    Attributes:
        documents: int64 [tokens], the row of each token.
        divergence: float64 [tokens], KL(source || release), nats.
        loss_source, loss_release: float64 [tokens], negative log-likelihood of the text's next token, nats.
        agrees: bool [tokens], both models have the same most likely token.
        greedy_source, greedy_release: int64 [rows, length], the most likely next token after every position, the last ones included.
    """

    documents: Tensor
    divergence: Tensor
    loss_source: Tensor
    loss_release: Tensor
    agrees: Tensor
    greedy_source: Tensor
    greedy_release: Tensor


@dataclass(frozen=True)
class Chunk:
    """The measures of some consecutive positions, each [positions], in main memory."""

    divergence: Tensor
    loss_source: Tensor
    loss_release: Tensor
    greedy_source: Tensor
    greedy_release: Tensor


def positions_per_chunk(vocabulary: int) -> int:
    """How many positions' logits fit in `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


@torch.no_grad()
def compare_logits(source_PV: Tensor, release_PV: Tensor, next_P: Tensor) -> Chunk:
    """Both models' logits at the same positions.

    Args:
        source_PV, release_PV: logits [positions, vocabulary], any float dtype; where they are is where they are compared.
        next_P: int64 [positions], the token that follows.
    """
    source_PV, release_PV, next_P = source_PV.float(), release_PV.float(), next_P.to(source_PV.device)
    log_p, log_q = torch.log_softmax(source_PV, dim=-1), torch.log_softmax(release_PV, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1, dtype=torch.float64)
    return Chunk(
        divergence.clamp_min_(0).cpu(),
        _loss(log_p, next_P).cpu(),
        _loss(log_q, next_P).cpu(),
        source_PV.argmax(dim=-1).cpu(),
        release_PV.argmax(dim=-1).cpu(),
    )


@torch.no_grad()
def measure_tokens(
    source_NTD: Tensor,
    release_NTD: Tensor,
    source_logits: Logits,
    release_logits: Logits,
    ids_NT: Tensor,
    vocabulary: int,
) -> TokenMeasures:
    """Every position of every row, from the normed hidden states of both models.

    Args:
        source_NTD, release_NTD: hidden states after the final norm [rows, length, hidden].
        source_logits, release_logits: each model's head.
        ids_NT: int64 [rows, length].
        vocabulary: rows of the heads; sets how many positions are looked at together.
    """
    size = positions_per_chunk(vocabulary)
    rows = [
        _measure_row(source, release, source_logits, release_logits, ids, size)
        for source, release, ids in zip(source_NTD, release_NTD, ids_NT, strict=True)
    ]
    greedy_source, greedy_release = (
        torch.stack([getattr(r, name) for r in rows]) for name in ("greedy_source", "greedy_release")
    )
    documents = torch.arange(len(rows)).repeat_interleave(ids_NT.shape[1] - 1)
    divergence, loss_source, loss_release = (
        torch.cat([getattr(r, name)[:-1] for r in rows]) for name in ("divergence", "loss_source", "loss_release")
    )
    agrees = (greedy_source == greedy_release)[:, :-1].flatten()
    return TokenMeasures(documents, divergence, loss_source, loss_release, agrees, greedy_source, greedy_release)


def histogram(values: Tensor) -> tuple[list[float], list[int]]:
    """Edges and counts over `HISTOGRAM_EDGES`; what lies outside counts in the first or the last bin."""
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
    bins = torch.bucketize(values.to(torch.float64), edges[1:-1], right=True)
    return list(HISTOGRAM_EDGES), torch.bincount(bins, minlength=len(edges) - 1).tolist()


def _measure_row(
    source_TD: Tensor, release_TD: Tensor, source_logits: Logits, release_logits: Logits, ids_T: Tensor, size: int
) -> Chunk:
    """All positions of one row. The last one has no next token: its loss is against token 0 and must be dropped."""
    next_T = torch.cat([ids_T[1:], ids_T.new_zeros(1)])
    chunks = [
        compare_logits(source_logits(source), release_logits(release), following)
        for source, release, following in zip(
            *(torch.split(values, size) for values in (source_TD, release_TD, next_T)), strict=True
        )
    ]
    names = ("divergence", "loss_source", "loss_release", "greedy_source", "greedy_release")
    return Chunk(*(torch.cat([getattr(c, name) for c in chunks]) for name in names))


def _loss(log_PV: Tensor, next_P: Tensor) -> Tensor:
    return -log_PV.gather(-1, next_P[:, None]).squeeze(-1).to(torch.float64)
