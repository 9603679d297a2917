"""Experts on the tokens that are sent to them, for processors.

Each expert gets another number of tokens in each batch. In bfloat16 that is costly on a processor: for every shape that it has not seen, oneDNN writes new machine code and keeps it, 0.6 MB and
half a millisecond each, hundreds of MB over a walk. So the rows of such products are filled up with zeros to a multiple of `ROWS`: rows do not know of each other, and few shapes are left.

Letters in names: N tokens, n those of one expert, K experts that a token is sent to, D hidden size, I width of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 64


def even(x: Tensor) -> Tensor:
    """Tokens [n, ...], with zeros behind them where products of so many would be a shape of their own."""
    short = -len(x) % ROWS if x.dtype == torch.bfloat16 and x.device.type == "cpu" else 0
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, short)) if short else x


def even_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in] times a weight [out, in]: [n, out]."""
    return F.linear(even(x), weight)[: len(x)]


def expert_outputs(x_nD: Tensor, gate_up: Tensor, down: Tensor, activation: Any) -> Tensor:
    """What an expert with the weights [2I, D] and [D, I] makes of its tokens, [n, D]."""
    gate, up = F.linear(even(x_nD), gate_up).chunk(2, -1)
    return F.linear(activation(gate) * up, down)[: len(x_nD)]


def run_experts(experts: Any, hidden_ND: Tensor, chosen_NK: Tensor, shares_NK: Tensor) -> Tensor:
    """In place of the `forward` of transformers' module of all experts: the same sums in the same order.

    Gradients are gathered expert by expert, where those of an indexed parameter would be added up over all experts once for each.
    """
    total_ND, gates, downs = torch.zeros_like(hidden_ND), experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0)
    for expert in torch.unique(chosen_NK).tolist():
        rank, token = torch.where(chosen_NK.T.eq(expert))
        out_nD = expert_outputs(hidden_ND.index_select(0, token), gates[expert], downs[expert], experts.act_fn)
        total_ND.index_add_(0, token, (out_nD * shares_NK[token, rank, None]).to(total_ND.dtype))
    return total_ND
