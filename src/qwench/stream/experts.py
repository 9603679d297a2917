"""What every routed expert of a layer puts out on the way of the rows, before the router's weights: what pruning ranks experts by.

The layer computes each expert's output anyway, so listening costs no pass of its own.

Letters in names: n tokens of one expert, N tokens, K experts that a token is sent to, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qwench.models.expert_products import expert_outputs
from qwench.stream.live import LiveBlock

TakeExpert = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with an expert, what it reads [n, D], the router's weights for it [n], what it puts out [n, D]."""


@contextmanager
def taking_experts(live: LiveBlock, take: TakeExpert) -> Iterator[None]:
    """While it lasts, every expert that a layer runs is also shown to `take`. The layer puts out what it would."""
    experts: Any = live.submodule(next(slot for slot in live.block.slots if slot.expert is not None))

    def forward(hidden_ND: Tensor, chosen_NK: Tensor, shares_NK: Tensor) -> Tensor:
        total_ND = torch.zeros_like(hidden_ND)
        for expert in torch.unique(chosen_NK).tolist():
            rank, token = torch.where(chosen_NK.T.eq(expert))
            x, shares = hidden_ND[token], shares_NK[token, rank]
            out = expert_outputs(x, experts.gate_up_proj[expert], experts.down_proj[expert], experts.act_fn)
            take(expert, x, shares, out)
            total_ND.index_add_(0, token, (out * shares[:, None]).to(total_ND.dtype))
        return total_ND

    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward
