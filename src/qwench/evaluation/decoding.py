"""Generating one row: plainly, and with drafts of the MTP head. The reference: what it does is meant to be read.

One round of speculation, with x_0 .. x_n chosen and x_0 .. x_{n-1} read by the trunk, which gave the hidden states h_0 .. h_{n-1}:

1. The head reads (h_t, x_{t+1}) for every t that is new to it, the last of them (h_{n-1}, x_n), and drafts d_1; from its own state and d_1 it drafts d_2, and so on to d_K.
2. The trunk reads x_n, d_1 .. d_K in one forward: K + 1 hidden states, each with the distribution of the token that comes after it.
3. Drafts are accepted in order up to the first that is refused, j of them, and one token more is chosen (`sampling.judge`): j + 1 tokens for one forward.
4. What both remember of refused drafts is forgotten. So is what the head remembers of accepted ones: it was made of its own states, and step 1 of the next round makes
   it again from the trunk's.

The first token comes from the trunk reading the prompt: no draft is behind it. The last round may give more tokens than were asked for; they are cut off, and its drafts count in full, as
engines count them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwench.errors import TextError
from qwench.evaluation.sampling import Sampling, draw, judge


class Model(Protocol):
    """What is decoded: `qwench.models.decoder.Reading` is one. Tokens are read in order; the last ones can be forgotten."""

    @property
    def length(self) -> int: ...

    def read(self, tokens: Sequence[int], keep: bool = False) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def embed(self, tokens: Sequence[int]) -> Tensor: ...

    def rewind(self, length: int) -> None: ...


class Drafter(Protocol):
    """What drafts: `qwench.models.mtp.HeadReading` is one."""

    @property
    def length(self) -> int: ...

    def read(self, hidden_TD: Tensor, embedded_TD: Tensor) -> Tensor: ...

    def rewind(self, length: int) -> None: ...


@dataclass(frozen=True)
class Generated:
    """One row.

    Attributes:
        tokens: what was generated, the prompt not included.
        accepted: for each round, how many of its drafts were accepted.
    """

    tokens: list[int]
    accepted: list[int]


def generate(
    model: Model, prompt: Sequence[int], tokens: int, sampling: Sampling = Sampling(), seed: int = 0, stop: Collection[int] = (),
) -> list[int]:  # fmt: skip
    """Plain decoding, one forward for each token.

    Args:
        model: of which nothing has been read yet.
        prompt: at least one token.
        tokens: how many to generate.
        sampling: how they are chosen.
        seed: of the source of chance.
        stop: tokens after which the row ends.

    Raises:
        TextError: an empty prompt.
        CheckpointError: from the model.
    """
    generator, found = _generator(seed), list[int]()
    hidden = model.read(_checked(prompt))
    while True:
        found.append(draw(sampling.distribution(model.logits(hidden[-1])), generator))
        if len(found) == tokens or found[-1] in stop:
            return found
        hidden = model.read(found[-1:])


def generate_with_drafts(
    model: Model, drafter: Drafter, prompt: Sequence[int], tokens: int, drafts: int, sampling: Sampling = Sampling(), seed: int = 0,
    stop: Collection[int] = (),
) -> Generated:  # fmt: skip
    """Speculative decoding: tokens of the same distribution as `generate`, and at temperature 0 the same tokens (up to near ties that rounding decides: a forward
    over several positions adds in another order than one over each).

    Args:
        drafter: of which nothing has been read yet.
        drafts: tokens drafted in each round, at least 1.

    The others, and what is raised, as in `generate`.
    """
    assert drafts >= 1 and tokens >= 1
    generator = _generator(seed)
    hidden = model.read(_checked(prompt))
    found = [draw(sampling.distribution(model.logits(hidden[-1])), generator)]
    fresh, accepted = [*prompt[1:], found[-1]], list[int]()
    while len(found) < tokens and found[-1] not in stop:
        drafted, distributions = draft(model, drafter, hidden, fresh, drafts, sampling, generator)
        before = model.length
        hidden = model.read([found[-1], *drafted], keep=True)
        count, token = judge(sampling.distribution(model.logits(hidden)), distributions, drafted, generator)
        model.rewind(before + 1 + count)
        hidden, fresh = hidden[: 1 + count], [*drafted[:count], token]
        accepted.append(count)
        found += fresh[: _until(fresh, stop)]
    return Generated(found[:tokens], accepted)


def draft(
    model: Model, drafter: Drafter, hidden_TD: Tensor, fresh: Sequence[int], drafts: int, sampling: Sampling, generator: torch.Generator,
) -> tuple[list[int], Tensor]:  # fmt: skip
    """Step 1 of a round.

    Args:
        hidden_TD: the trunk's hidden states at the positions that are new to the head.
        fresh: the token after each of them, T tokens.

    Returns:
        The drafts, and the distributions that they were drawn from, float64 [K, V]. The head remembers the new positions, and no draft.
    """
    state, drafted, distributions = drafter.read(hidden_TD, model.embed(fresh))[-1:], list[int](), list[Tensor]()
    known = drafter.length
    for number in range(drafts):
        if number:
            state = drafter.read(state, model.embed(drafted[-1:]))
        distributions.append(sampling.distribution(model.logits(state[0])))
        drafted.append(draw(distributions[-1], generator))
    drafter.rewind(known)
    return drafted, torch.stack(distributions)


def _until(tokens: Sequence[int], stop: Collection[int]) -> int:
    """How many tokens there are up to the first that stops."""
    return next((number for number, token in enumerate(tokens, start=1) if token in stop), len(tokens))


def _checked(prompt: Sequence[int]) -> Sequence[int]:
    if not prompt:
        raise TextError("the prompt is empty", "give at least one token to go on from")
    return prompt


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
