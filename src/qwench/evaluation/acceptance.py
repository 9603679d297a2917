"""Would the trunk accept what its MTP head drafts? Acceptance at draft positions 1 to K, teacher-forced.

At position t the trunk has read x_0 .. x_t. The head drafts from the trunk's normed hidden state h_t: step 1 reads (h_t, x_{t+1}) and drafts the token
at t+2; step k reads (its own hidden state of step k-1, x_{t+k}) and drafts the token at t+k+1. The trunk's own greedy choice for that place is
argmax logits(h_{t+k}). Draft k is accepted where both agree and every draft before it was accepted, as engines report accepted tokens per position
divided by drafts: the share at position k is over all drafts, not over those that came so far.

How this differs from the acceptance of a running engine:

- The context is the text. A running engine reads what it wrote itself, which it finds easier to predict; its acceptance is usually higher, and depends
  on prompts and sampling. This estimate depends on the text alone, and is the same on every machine.
- Step k reads the text's token x_{t+k}; a running engine feeds back its own draft. Where draft k-1 was accepted the engine goes on with the trunk's choice,
  we with the text's token, and where those differ the two are in different contexts.
- Both sides of the comparison read the same tokens, so that a head against its own trunk, before and after quantization, is compared like with like.

Nothing here runs a trunk: its hidden states are those of the pass that measured divergence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwench.evaluation.statistics import Mean, clustered_mean
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk

DRAFTS = 3
"""Draft positions that are measured."""


@torch.no_grad()
def draft_tokens(trunk: Trunk, head: MtpHead, normed_NTD: Tensor, ids_NT: Tensor, steps: int = DRAFTS) -> list[Tensor]:
    """What the head drafts at every position of every row, one row at a time.

    Args:
        trunk: the trunk that the head belongs to: its embedding and its lm_head are the head's as well.
        head: the MTP head.
        normed_NTD: the trunk's hidden states after its final norm [rows, length, hidden].
        ids_NT: int64 [rows, length].
        steps: how far to draft.

    Returns:
        For each step k = 1 .. `steps`, int64 [rows, length - k]: entry t is the draft for the place after position t + k.
    """
    rows = []
    for normed, ids in zip(normed_NTD[:, None], ids_NT[:, None], strict=True):
        rows.append([trunk.greedy(hidden) for hidden in head.drafts(normed, trunk.embed(ids), steps)])
    return [torch.cat(step) for step in zip(*rows, strict=True)]


def accepted(trunk_NT: Tensor, drafts: Sequence[Tensor]) -> Tensor:
    """Which drafts the trunk accepts, bool [rows, length - K, K].

    Args:
        trunk_NT: int64 [rows, length], the trunk's greedy choice after each position.
        drafts: for each step k = 1 .. K, int64 [rows, length - k]: entry t is the draft for the place after position t + k.
    """
    steps, places = len(drafts), trunk_NT.shape[1] - len(drafts)
    assert all(draft.shape[1] == trunk_NT.shape[1] - k for k, draft in enumerate(drafts, start=1)) and places > 0
    agrees = [draft[:, :places] == trunk_NT[:, k : k + places] for k, draft in enumerate(drafts, start=1)]
    return torch.stack(agrees, dim=-1).cumprod(dim=-1).bool().reshape(len(trunk_NT), places, steps)


def acceptance(accepted_NPK: Tensor) -> list[Mean]:
    """Share of drafts accepted at each position, with a standard error over rows. Raises TextError for fewer than two rows."""
    rows, places, steps = accepted_NPK.shape
    documents = torch.arange(rows).repeat_interleave(places)
    return [clustered_mean(accepted_NPK[:, :, k].flatten(), documents) for k in range(steps)]
