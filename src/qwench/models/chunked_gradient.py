"""The way back through chunks of Gated DeltaNet: gradients of what `chunked_delta` computes, by hand.

With written = M (beta X), X = v - exp(G) K S, M the inverse of I + A, A = strictly lower(beta_i k_i.k_j decay_ij), and P = lower(q_i.k_j decay_ij), a chunk with the
gradients d_out of what it puts out and d_S' of the state behind it gives back

    d_written = P^T d_out + exp(G_C - G) K d_S'          d_missing = M^T d_written          d_A = - d_missing written^T
    d_S = exp(G_C) d_S' + Q^T (exp(G) d_out) - K^T (exp(G) beta d_missing)

and everything else follows from these, for all chunks at once.

Letters in names: as in `chunks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qwench.models.chunks import Chunks, cut, decayed, joined


@dataclass(frozen=True)
class Back:
    """What the gradients are made of. Names: `d_x` is the gradient of x.

    Attributes:
        chunks: the rows.
        states: before the chunks, [B*H, N, K, R*V].
        written: [B*E, N, C, V].
        d_out: of what is read, [B*E, N, C, V].
        d_known: of what keys, and behind them queries, find in the states, [B*E, N, 2C, V].
        d_missing: of beta X, [B*E, N, C, V].
        d_states: of the states behind the chunks, [B*H, N, K, R*V].
    """

    chunks: Chunks
    states: Tensor
    written: Tensor
    d_out: Tensor
    d_known: Tensor
    d_missing: Tensor
    d_states: Tensor

    def value(self) -> Tensor:
        """[B, T, E, V]."""
        return joined(self.d_missing * self.chunks.beta, self.chunks.shape)

    def query_and_key(self) -> tuple[Tensor, Tensor]:
        """[B, T, H, K] both."""
        chunks, size = self.chunks, self.chunks.shape[5]
        d_both = chunks.by_key_head(self.d_known) @ self.states.transpose(-1, -2)
        d_seen, d_alike = chunks.summed(self._d_seen), chunks.summed(self._d_system * chunks.beta)
        d_query = d_both[:, :, size:] + d_seen @ chunks.key_BH
        d_key = d_both[:, :, :size] + d_seen.transpose(-1, -2) @ chunks.query_BH
        d_key += (d_alike + d_alike.transpose(-1, -2)) @ chunks.key_BH
        d_key += chunks.by_key_head(self._carried) @ self.d_states.transpose(-1, -2)
        root = chunks.key_BH.shape[-1] ** 0.5
        return (
            joined(_before_length(d_query / root, chunks.query_BH * root, chunks.length_query), chunks.shape),
            joined(_before_length(d_key, chunks.key_BH, chunks.length_key), chunks.shape),
        )

    def gates(self) -> tuple[Tensor, Tensor]:
        """Of g and beta, [B, T, E] both."""
        chunks, size = self.chunks, self.chunks.shape[5]
        seen, alike = chunks.pairs(chunks.query_BH), chunks.pairs(chunks.key_BH)
        known = chunks.by_value_head(torch.cat([chunks.key_BH, chunks.query_BH], 2) @ self.states)
        by_keys, by_queries = known[:, :, :size] * chunks.grown, known[:, :, size:] * chunks.grown
        d_beta = (self.d_missing * (chunks.value - by_keys)).sum(-1) + (self._d_system * alike).sum(-1)
        pairs = self._d_system * chunks.beta * alike + self._d_seen * seen
        d_total = pairs.sum(-1) - pairs.sum(-2) + (self.d_out * by_queries).sum(-1)
        d_total -= (self.d_missing * chunks.beta * by_keys).sum(-1)
        ending = (self._carried * chunks.by_value_head(chunks.key_BH @ self.d_states)).sum(-1)
        d_total -= ending
        d_total[..., -1] += ending.sum(-1) + self._d_whole()
        d_decay = d_total.flip(-1).cumsum(-1).flip(-1)
        decay, beta = (joined(slope.unsqueeze(-1), chunks.shape).squeeze(-1) for slope in (d_decay, d_beta))
        return decay, beta

    @cached_property
    def _carried(self) -> Tensor:
        """What is written, as much of it as is left when the chunk ends."""
        return self.written * self.chunks.rest

    @cached_property
    def _d_seen(self) -> Tensor:
        """Of P; what stands above the diagonal means nothing."""
        return self.d_out @ self.written.transpose(-1, -2)

    @cached_property
    def _d_system(self) -> Tensor:
        """Of A."""
        return (self.d_missing @ self.written.transpose(-1, -2)).neg_().tril_(-1)

    def _d_whole(self) -> Tensor:
        """Of the log of a chunk's decay as far as it scales the state, [B*E, N]."""
        products = (self.states * self.d_states).sum(2)
        by_head = products.view(*products.shape[:-1], self.chunks.shape[3], -1).sum(-1)
        return (by_head * self.chunks.whole.flatten(2)).transpose(1, 2).flatten(0, 1)


def way_back(chunks: Chunks, solution: Tensor, states: Tensor, written: Tensor, gradient: Tensor) -> Back:
    """Go through the chunks, the last one first.

    Args:
        solution: M above, [B*E, N, C, C].
        states: before the chunks, [N, B*H, K, R*V].
        written: [B*E, N, C, V].
        gradient: of what is read, [B, T, E, V].
    """
    size, count = chunks.shape[5], chunks.shape[4]
    d_out, both = cut(gradient, chunks.shape), torch.cat([chunks.key_BH, chunks.query_BH], 2)
    d_written = chunks.pairs(chunks.query_BH).transpose(-1, -2) @ d_out
    d_known, d_missing = torch.cat([d_out, d_out * chunks.grown], 2), torch.empty_like(d_out)
    state, taken = torch.zeros_like(states[0]), -chunks.beta * chunks.grown
    d_states = state.new_empty(len(both), count, *state.shape[1:])
    for at in reversed(range(count)):
        d_states[:, at] = state
        d_new = chunks.by_value_head(chunks.key_BH[:, at] @ state).mul_(chunks.rest[:, at]).add_(d_written[:, at])
        missing = d_missing[:, at] = solution[:, at].transpose(1, 2) @ d_new
        d_known[:, at, :size] = missing * taken[:, at]
        state = decayed(state, chunks.whole[:, at])
        state.baddbmm_(both[:, at].transpose(1, 2), chunks.by_key_head(d_known[:, at]))
    return Back(chunks, states.movedim(0, 1), written, d_out, d_known, d_missing, d_states)


def _before_length(slope: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """The gradient of vectors from that of the same at unit length; `length` is one over their lengths."""
    return (slope - unit * (slope * unit).sum(-1, keepdim=True)) * length
