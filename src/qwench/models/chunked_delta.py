"""Gated DeltaNet over whole rows, for processors: what `torch_chunk_gated_delta_rule` of transformers computes, in a third of the time, and with a backward pass of its own.

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - (exp(g_t) S_{t-1})^T k_t))^T          o_t = S_t^T q_t

Within a chunk of C positions, with G the running sum of g, decay_ij = exp(G_i - G_j) for j <= i, and S the state before the chunk (Yang, Kautz and Hatamizadeh, Gated Delta
Networks, 2024):

    written = (I + strictly lower(beta_i k_i.k_j decay_ij))^-1 (beta (v - exp(G) K S))
    out = exp(G) Q S + lower(q_i.k_j decay_ij) written
    S' = exp(G_C) S + K^T (exp(G_C - G) written)

The same sums as there, so the same numbers up to the rounding of float32. What makes it faster on a processor: keys and queries are not repeated for the value heads that share them (the
states of these heads lie side by side, and one product serves them all); the system is solved once and not for values and keys apart; chunks of 32 positions have half the
pairs of those of 64; and the gradient is worked out by hand from the states between chunks and what was written, where autograd would keep some thirty tensors of the size of the values.

Letters in names: B rows, T positions, N chunks, C positions of a chunk, H heads of queries and keys, E value heads (R for each of H), K and V their widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwench.models.chunked_gradient import way_back
from qwench.models.chunks import Chunks, cut_into_chunks, decayed, joined, solved

ELEMENTS = 1 << 23
"""Values (rows times positions times value heads times width) that are worked on at once, whole rows of them."""


def chunked_delta(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """What every position reads.

    Args:
        query, key: [B, T, H, K]; they are brought to unit length here.
        value: [B, T, E, V]; E a multiple of H, consecutive heads share a key.
        g: log of the decay, [B, T, E], at most 0.
        beta: [B, T, E].

    Returns:
        [B, T, E, V] in the dtype of `query`; worked out in float32. Gradients flow to all five.
    """
    at_once = max(1, ELEMENTS // max(1, value[0].numel()))
    parts = zip(*(torch.split(x, at_once) for x in (query, key, value, g, beta)), strict=True)
    read: list[Tensor] = [_ChunkedDelta.apply(*part) for part in parts]  # type: ignore[no-untyped-call]
    return read[0] if len(read) == 1 else torch.cat(read)


class _ChunkedDelta(torch.autograd.Function):
    """Kept for the way back: the inputs, the solution of each chunk's system, the states between chunks, and what was written."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        chunks = cut_into_chunks(query, key, value, g, beta)
        solution = solved((chunks.pairs(chunks.key_BH) * chunks.beta).tril_(-1))
        wanted = any(ctx.needs_input_grad)
        out, states, written = _scan(chunks, solution, chunks.pairs(chunks.query_BH), wanted)
        if wanted:
            ctx.save_for_backward(query, key, value, g, beta, solution, states, written)
        return joined(out, chunks.shape).to(query.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, (solution, states, written) = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        chunks = cut_into_chunks(*inputs)
        back = way_back(chunks, solution, states, written, gradient)
        d_gates = back.gates() if any(ctx.needs_input_grad[3:]) else (None, None)
        found = (*back.query_and_key(), back.value(), *d_gates)
        return tuple(None if slope is None else slope.to(x.dtype) for slope, x in zip(found, inputs, strict=True))


def _scan(chunks: Chunks, solution: Tensor, seen: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk after chunk.

    Args:
        seen: q_i . k_j, decayed.

    Returns:
        What is read and what is written [B*E, N, C, V], and the states before the chunks [N, B*H, K, R*V] (empty unless `keep`).
    """
    size, count = chunks.shape[5], chunks.shape[4]
    both = torch.cat([chunks.key_BH, chunks.query_BH], 2)
    state = both.new_zeros(len(both), both.shape[-1], chunks.shape[3] * chunks.value.shape[-1])
    states = state.new_empty(count if keep else 0, *state.shape)
    out, written = torch.empty_like(chunks.value), torch.empty_like(chunks.value)
    for at in range(count):
        if keep:
            states[at] = state
        known = chunks.by_value_head(both[:, at] @ state)
        missing = torch.addcmul(chunks.value[:, at], chunks.grown[:, at], known[:, :size], value=-1).mul_(chunks.beta[:, at])
        new = written[:, at] = solution[:, at] @ missing
        out[:, at] = torch.baddbmm(known[:, size:].mul_(chunks.grown[:, at]), seen[:, at], new)
        state = decayed(state, chunks.whole[:, at])
        state.baddbmm_(chunks.key_BH[:, at].transpose(1, 2), chunks.by_key_head(new * chunks.rest[:, at]))
    return out, states, written
