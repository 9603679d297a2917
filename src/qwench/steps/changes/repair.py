"""Making up for pruned experts in a walk: the down projections of the shared expert and of those that stay are changed so that together they add to each token what all experts did.

Before the others go, the layer's rows are taken through it once, and what its experts read and add is kept for some of the tokens. Then the shared expert, which reads every token, takes over what it can of
what is missing, and after it one expert after the other on its own tokens, each by least squares (see `methods.least_squares`). Every fourth batch of rows is fitted on by none of
them: a change is taken where it lowers the error there, and the record has that error before and after.

Letters in names: N tokens, D hidden size, n tokens of one expert, I its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwench.methods.least_squares import correction
from qwench.models.map import Slot
from qwench.stream.live import LiveBlock
from qwench.stream.walk import Rows

HELD_OUT = 4
"""Every fourth batch of rows judges and does not fit."""
BYTES = 2 * 2**30
"""Of what experts read and add that is kept; rows beyond that are left out."""


@dataclass
class Added:
    """What the experts of a layer read and add on some tokens.

    Attributes:
        inputs_ND: what they read.
        missing_ND: what they add together, weighted; later, what is still missing of it.
        judge_N: the tokens that are not fitted on.
    """

    inputs_ND: Tensor
    missing_ND: Tensor
    judge_N: Tensor

    def error(self) -> float:
        """Sum of squares that is missing on the tokens that judge."""
        return float(self.missing_ND[self.judge_N].double().square().sum())


@torch.no_grad()
def added_by_all(live: LiveBlock, rows: Rows) -> Added:
    """Take rows through a layer that has all its experts."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = _experts(live).register_forward_hook(lambda _module, read, put_out: seen.append((read[0], put_out)))
    held = 0
    try:
        for batch in rows.batches():
            live.run(batch)
            held += 2 * seen[-1][0].nbytes
            if held > BYTES:
                break
    finally:
        handle.remove()
    judges = [torch.full((len(x),), number % HELD_OUT == HELD_OUT - 1) for number, (x, _) in enumerate(seen)]
    inputs, wanted = (torch.cat(parts) for parts in zip(*seen, strict=True))
    sound = (inputs.isfinite() & wanted.isfinite()).all(-1)
    return Added(inputs[sound], wanted[sound], torch.cat(judges).to(sound.device)[sound])


@torch.no_grad()
def repair(live: LiveBlock, added: Added) -> tuple[float, float, int]:
    """Change the down projections of a layer whose other experts are gone.

    Returns:
        The relative squared error on the tokens that judge, before and after, and how many projections were changed. (0, 0, 0) where no token judges.
    """
    whole = added.error()
    if not whole > 0:
        return 0.0, 0.0, 0
    downs = [slot for slot in live.block.slots if slot.role.removeprefix("mtp.") in ("shared.down", "expert.down")]
    asked = _asked(live, added.inputs_ND, downs)
    for slot in downs:
        if slot.expert is not None:
            token_n, shares_n = asked[slot.module]
            added.missing_ND.index_add_(0, token_n, _read(live, slot, added, token_n, shares_n) @ live.weight(slot).T, alpha=-1)
    before, changed = added.error(), 0
    for slot in sorted(downs, key=lambda slot: slot.expert is not None):  # the shared expert first
        changed += _correct(live, slot, added, *asked[slot.module])
    return before / whole, added.error() / whole, changed


def _asked(live: LiveBlock, inputs_ND: Tensor, downs: Sequence[Slot]) -> dict[str, tuple[Tensor, Tensor]]:
    """By module: which tokens a down projection is asked for, and the weight with which it adds to them."""
    router: Any = live.layer.get_submodule("mlp.gate")
    logits = F.linear(inputs_ND, live.weights["mlp.gate.weight"])
    shares_NK, chosen_NK = logits.softmax(-1, dtype=torch.float32).topk(router.top_k)
    shares_NK = (shares_NK / shares_NK.sum(-1, keepdim=True)).to(inputs_ND.dtype)
    shared_N = torch.sigmoid(F.linear(inputs_ND, live.weights["mlp.shared_expert_gate.weight"]))[:, 0]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for slot in downs:
        if slot.expert is None:
            found[slot.module] = torch.arange(len(inputs_ND), device=inputs_ND.device), shared_N
        else:
            token_n, rank_n = torch.where(chosen_NK.eq(slot.expert))
            found[slot.module] = token_n, shares_NK[token_n, rank_n]
    return found


def _correct(live: LiveBlock, slot: Slot, added: Added, token_n: Tensor, shares_n: Tensor) -> bool:
    """Change one down projection by what it can take over on its tokens, where that helps on those that judge."""
    read, missing, judge = _read(live, slot, added, token_n, shares_n), added.missing_ND[token_n], added.judge_N[token_n]
    change = correction(read[~judge], missing[~judge])
    left = missing - read @ change.T
    if not float(left[judge].square().sum()) < float(missing[judge].square().sum()):
        return False
    live.alter(slot, live.weight(slot) + change)
    added.missing_ND[token_n] = left
    return True


def _read(live: LiveBlock, slot: Slot, added: Added, token_n: Tensor, shares_n: Tensor) -> Tensor:
    """What a down projection reads of some tokens, times the weight with which it adds to them: [n, I]."""
    x, weights = added.inputs_ND[token_n], live.weights
    if slot.expert is None:
        gate, up = (F.linear(x, weights[f"mlp.shared_expert.{half}_proj.weight"]) for half in ("gate", "up"))
    else:
        gate, up = F.linear(x, weights["mlp.experts.gate_up_proj"][slot.expert]).chunk(2, -1)
    return F.silu(gate) * up * shares_n[:, None]


def _experts(live: LiveBlock) -> Any:
    return live.submodule(next(slot for slot in live.block.slots if slot.expert is not None))
