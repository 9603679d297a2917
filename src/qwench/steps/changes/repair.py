"""Making up for pruned experts in a walk: factors for those that stay (see `methods.expert_scale`), fitted on most of the rows, judged on the others.

The layer still has all its experts and puts out what it always did; beside it, the experts that will stay answer for the same inputs with the routing that will be left. What both add to each token goes
into sums, and nothing else is kept.

Letters in names: N tokens, K experts that a token is sent to, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwench.methods.expert_scale import ScaleSums
from qwench.stream.live import LiveBlock
from qwench.stream.walk import Rows

HELD_OUT = 4
"""Every fourth batch of rows judges and does not fit."""


@torch.no_grad()
def scale_sums(live: LiveBlock, rows: Rows, kept: Sequence[int]) -> tuple[ScaleSums, ScaleSums]:
    """Sums over the rows that fit and over those that judge, from a layer that has all its experts."""
    fit, judge = ScaleSums.zero(len(kept)), ScaleSums.zero(len(kept))
    experts: Any = live.submodule(next(slot for slot in live.block.slots if slot.expert is not None))
    seen: list[tuple[Tensor, Tensor]] = []
    handle = experts.register_forward_hook(lambda _module, read, put_out: seen.append((read[0], put_out)))
    try:
        for number, batch in enumerate(rows.batches()):
            live.run(batch)
            x_ND, wanted_ND = seen.pop()
            chosen_NK, added_NKD = answers(live, experts, x_ND, kept)
            sound = wanted_ND.isfinite().all(-1) & added_NKD.isfinite().all((-1, -2))
            sums = judge if number % HELD_OUT == HELD_OUT - 1 else fit
            sums.add(chosen_NK[sound], added_NKD[sound], wanted_ND[sound])
    finally:
        handle.remove()
    return fit, judge


def answers(live: LiveBlock, experts: Any, x_ND: Tensor, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the experts that stay are asked, by their new numbers [N, K], and what each adds, router's weight included [N, K, D]."""
    router: Any = live.layer.get_submodule("mlp.gate")
    logits = F.linear(x_ND, live.weights["mlp.gate.weight"][list(kept)])
    shares_NK, chosen_NK = logits.softmax(-1, dtype=torch.float32).topk(router.top_k)
    shares_NK = (shares_NK / shares_NK.sum(-1, keepdim=True)).to(x_ND.dtype)
    added_NKD = x_ND.new_zeros(*chosen_NK.shape, x_ND.shape[1])
    for number in torch.unique(chosen_NK).tolist():
        token, rank = torch.where(chosen_NK.eq(number))
        gate, up = F.linear(x_ND[token], live.weights["mlp.experts.gate_up_proj"][kept[number]]).chunk(2, -1)
        out = F.linear(experts.act_fn(gate) * up, live.weights["mlp.experts.down_proj"][kept[number]])
        added_NKD[token, rank] = out * shares_NK[token, rank, None]
    return chosen_NK, added_NKD


def scale_experts(live: LiveBlock, factors: Tensor) -> None:
    """Multiply what each expert of a layer puts out, by its number in the layer as it is now."""
    for slot in live.block.slots:
        if slot.expert is not None and slot.role.endswith("expert.down"):
            live.alter(slot, live.weight(slot) * float(factors[slot.expert]))
