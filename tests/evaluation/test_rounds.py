"""Counting rounds of drafts: a literal engine, step by step, says the same."""

from __future__ import annotations

import pytest
import torch

from qwench.evaluation.rounds import Counters, count_rounds


def literal(text: list[int], drafts: list[list[int]], prompt: int) -> Counters:
    """An engine that asks a head for drafts: the head's k-th draft from place t is `drafts[k][t]`, as long as the ones before it were right."""
    written, rounds, drafted, by_position = prompt + 1, 0, 0, [0] * len(drafts)
    while written < len(text):
        left = len(text) - written
        wanted = [drafts[k][written - 2] for k in range(min(len(drafts), left - 1))]
        right = 0
        for draft in wanted:
            if draft != text[written + right]:
                break
            by_position[right] += 1
            right += 1
        rounds, drafted, written = rounds + bool(wanted), drafted + len(wanted), written + right + 1
    return Counters(rounds, drafted, sum(by_position), tuple(by_position))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("length", [19, 20, 23])
def test_as_a_literal_engine_counts(steps: int, length: int) -> None:
    generator = torch.Generator().manual_seed(steps * length)
    text = torch.randint(0, 2, (length,), generator=generator)  # of two tokens, so that many drafts are right
    drafts = [torch.randint(0, 2, (length - k,), generator=generator) for k in range(1, steps + 1)]
    found = count_rounds(text, drafts, prompt=7)
    assert found == literal(text.tolist(), [d.tolist() for d in drafts], 7)
    assert 0 < found.accepted < found.drafted


def test_a_head_that_is_always_right() -> None:
    text = torch.arange(40)
    found = count_rounds(text, [text[2:], text[3:]], prompt=10)
    assert found.by_position == (10, 9) and (found.rounds, found.drafted, found.accepted) == (10, 19, 19)


def test_a_head_that_is_never_right() -> None:
    found = count_rounds(torch.zeros(30, dtype=torch.int64), [torch.ones(29), torch.ones(28)], prompt=10)
    assert found == Counters(rounds=18, drafted=35, accepted=0, by_position=(0, 0))
