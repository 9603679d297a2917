"""What an engine's counters of drafts must show, from the text that it wrote and our own reading of its MTP head.

An engine that decodes greedily with drafts writes the same text as one without. So the text says which drafts were accepted, if one knows what the head drafts:

    the last token that is known stands at t; the head drafts K tokens for t + 1 .. t + K; those are accepted that the text has there, up to the first
    that it has not; with a accepted the next round begins at t + a + 1, for the trunk itself adds one token to them.

Where the head reads its own drafts they are, up to the first that is rejected, the text's own tokens: teacher-forced drafts (`acceptance.draft_tokens`) are those of
the engine, and the count is exact but for drafts that rounding decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.evaluation.acceptance import draft_tokens
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk


@dataclass(frozen=True)
class Counters:
    """Rounds, drafts, accepted drafts, and the rounds in which the draft at each position was accepted."""

    rounds: int
    drafted: int
    accepted: int
    by_position: tuple[int, ...]


@torch.no_grad()
def expected_counters(
    trunk: Trunk, head: MtpHead, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]], drafts: int
) -> Counters:
    """The counters that an engine must show.

    Args:
        trunk, head: our reading of what the engine ran.
        prompts: rows of tokens, equally long.
        written: what the engine wrote after each, equally long, greedily and with `drafts` drafts in each round.
        drafts: K.
    """
    ids_NT = torch.tensor([[*prompt, *text] for prompt, text in zip(prompts, written, strict=True)])
    normed_NTD = trunk.forward(ids_NT)
    tokens = draft_tokens(trunk, head, normed_NTD, ids_NT, drafts)
    rows = [count_rounds(ids, [step[row] for step in tokens], len(prompts[0])) for row, ids in enumerate(ids_NT)]
    return Counters(
        sum(r.rounds for r in rows), sum(r.drafted for r in rows), sum(r.accepted for r in rows),
        tuple(sum(counts) for counts in zip(*(r.by_position for r in rows), strict=True)),
    )  # fmt: skip


def count_rounds(ids_T: Tensor, drafts: Sequence[Tensor], prompt: int) -> Counters:
    """One row's rounds.

    Args:
        ids_T: int64 [T]: the prompt and what was written.
        drafts: for each step k = 1 .. K, int64 [T - k]: entry t is the draft for position t + k + 1, by a head that has read the tokens up to t + k.
        prompt: tokens of the prompt. The first token behind it comes from the trunk alone.
    """
    last, length = prompt, len(ids_T)
    rounds, drafted, by_position = 0, 0, [0] * len(drafts)
    while last + 1 < length:
        asked = min(len(drafts), length - last - 2)  # the trunk adds a token of its own: to draft the last one would be in vain
        accepted = 0
        while accepted < asked and int(drafts[accepted][last - 1]) == int(ids_T[last + accepted + 1]):
            by_position[accepted] += 1
            accepted += 1
        rounds, drafted, last = rounds + (asked > 0), drafted + asked, last + accepted + 1
    return Counters(rounds, drafted, sum(by_position), tuple(by_position))
