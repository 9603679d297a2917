"""Gated DeltaNet over a stretch of a sequence, with the state after every position of it.

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - (exp(g_t) S_{t-1})^T k_t))^T          o_t = S_t^T q_t

with q, k, v from a causal convolution over projections of the input, q and k of unit length (Yang, Kautz and Hatamizadeh, Gated Delta Networks, 2024). The layer of
transformers gives the state after the whole stretch alone. Verifying drafts needs the one after each position, without reading the projections' weights
once for each: so the projections and the convolution see the stretch as a whole, as they do there, and the rule goes position by position. The rule itself, in both its
forms, is that of transformers; a test holds what is around it to its layer.

Letters in names: T positions, D hidden size, C convolved channels, H value heads, A width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense

from qwench.models.cache import DeltaState
from qwench.models.kernels import kernels_for


def first_state(mixer: Any) -> DeltaState:
    """What a Gated DeltaNet layer of transformers knows before the first position."""
    weight = mixer.conv1d.weight
    return DeltaState(torch.zeros(1, weight.shape[0], weight.shape[-1] - 1, dtype=weight.dtype, device=weight.device))


def read_delta(mixer: Any, normed_1TD: Tensor, state: DeltaState, every: bool) -> tuple[Tensor, dict[int, DeltaState]]:
    """A stretch of a sequence through a mixer.

    Args:
        mixer: a Gated DeltaNet layer of transformers, with its weights.
        normed_1TD: what it reads: hidden states after the layer's input norm.
        state: the state before the first of them.
        every: keep the state after each position; else after the last alone, by chunks of positions, which is faster for long stretches.

    Returns:
        What it adds to the hidden states [1, T, D], and the kept states by the number of positions that they have read.
    """
    count = normed_1TD.shape[1]
    inputs = torch.cat([state.inputs, mixer.in_proj_qkv(normed_1TD).transpose(1, 2)], dim=-1)
    gates = dict(
        g=-mixer.A_log.float().exp() * F.softplus(mixer.in_proj_a(normed_1TD).float() + mixer.dt_bias),
        beta=mixer.in_proj_b(normed_1TD).sigmoid(),
    )
    heads = _convolved(mixer, inputs)
    with kernels_for(normed_1TD):
        read, recurrent = (_by_position if every or count == 1 else _by_chunk)(heads | gates, state.recurrent)
    kept = {n: DeltaState(_last_inputs(mixer, inputs, n), matrix) for n, matrix in recurrent.items()}
    gate = mixer.in_proj_z(normed_1TD).view(-1, mixer.head_v_dim)
    return mixer.out_proj(mixer.norm(read.reshape(-1, mixer.head_v_dim), gate).view(1, count, -1)), kept


def _convolved(mixer: Any, inputs: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values [1, T, heads, A] of inputs [1, C, kernel - 1 + T]."""
    mixed = ACT2FN[mixer.activation](F.conv1d(inputs, mixer.conv1d.weight, mixer.conv1d.bias, groups=inputs.shape[1]))
    query, key, value = mixed.transpose(1, 2).split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    return {
        "query": query.unflatten(-1, (-1, mixer.head_k_dim)),
        "key": key.unflatten(-1, (-1, mixer.head_k_dim)),
        "value": value.unflatten(-1, (-1, mixer.head_v_dim)),
    }


def _last_inputs(mixer: Any, inputs: Tensor, count: int) -> Tensor:
    """The kernel - 1 inputs of the convolution that end with the `count`-th position."""
    return inputs[..., count : count + mixer.conv1d.weight.shape[-1] - 1].clone()


def _by_position(heads: dict[str, Tensor], matrix: Tensor | None) -> tuple[Tensor, dict[int, Tensor]]:
    """What each position reads [1, T, H, A], and the matrix after each."""
    read, after = [], {}
    for t in range(heads["query"].shape[1]):
        here = {name: x[:, t : t + 1] for name, x in heads.items()}
        out, matrix = dense.torch_recurrent_gated_delta_rule(
            **here, initial_state=matrix, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        read.append(out)
        after[t + 1] = matrix
    return torch.cat(read, dim=1), after


def _by_chunk(heads: dict[str, Tensor], matrix: Tensor | None) -> tuple[Tensor, dict[int, Tensor]]:
    """The same for a long stretch, with the matrix after its last position alone."""
    read, matrix = dense.torch_chunk_gated_delta_rule(
        **heads, initial_state=matrix, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    return read, {heads["query"].shape[1]: matrix}
