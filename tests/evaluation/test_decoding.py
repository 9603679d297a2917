"""Speculation changes how fast a row is written, never what: over chains whose distributions are known, and over checkpoints of every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qwench.errors import TextError
from qwench.evaluation import sampling
from qwench.evaluation.decoding import generate, generate_with_drafts
from qwench.evaluation.sampling import Sampling
from qwench.models import map_of
from qwench.models.decoder import Decoder
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk
from tests.models.test_run import LAYOUTS
from tests.support.chains import Chain, ChainDrafter, chi_square, few_tokens, sequences, table
from tests.support.memory import tiny_source

VOCABULARY = 4
WARM = Sampling(temperature=0.8)
NARROW = Sampling(temperature=1.4, top_k=3, top_p=0.9)


def allowed(logits: Tensor, how: Sampling) -> list[float]:
    """The distribution of one token, written out."""
    weights = [math.exp(x / how.temperature) for x in logits.tolist()]
    best = sorted(range(len(weights)), key=lambda i: -weights[i])[: how.top_k or None]
    shares, kept = {i: weights[i] / sum(weights[j] for j in best) for i in best}, dict[int, float]()
    for i in best:
        if sum(kept.values()) < how.top_p:
            kept[i] = shares[i]
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(weights))]


def exact(trunk: Tensor, prompt: list[int], length: int, how: Sampling) -> dict[tuple[int, ...], float]:
    found = {}
    for sequence in sequences(len(trunk), length):
        tokens, share = [*prompt, *sequence], 1.0
        for place in range(len(prompt), len(tokens)):
            share *= allowed(trunk[tokens[place - 2], tokens[place - 1]], how)[tokens[place]]
        if share:
            found[sequence] = share
    return found


def sampled(how: Sampling, draws: int, drafts: int = 2) -> list[tuple[int, ...]]:
    trunk, head = table(VOCABULARY, 1), table(VOCABULARY, 1) + table(VOCABULARY, 2, 1.0)
    return [
        tuple(generate_with_drafts(Chain(trunk), ChainDrafter(head), [2, 3], 4, drafts, how, seed).tokens)
        for seed in range(draws)
    ]


@pytest.mark.parametrize("how", [WARM, NARROW], ids=["warm", "narrow"])
def test_sampled_rows_have_the_models_distribution(how: Sampling) -> None:
    expected = exact(table(VOCABULARY, 1), [2, 3], 4, how)
    assert sum(expected.values()) == pytest.approx(1) and len(expected) > 20
    assert chi_square(sampled(how, 1500), expected) > 1e-3


def test_so_have_those_of_plain_sampling() -> None:
    rows = [tuple(generate(Chain(table(VOCABULARY, 1)), [2, 3], 4, NARROW, seed)) for seed in range(1500)]
    assert chi_square(rows, exact(table(VOCABULARY, 1), [2, 3], 4, NARROW)) > 1e-3


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "residual", lambda p, q: p)
    assert chi_square(sampled(WARM, 1500), exact(table(VOCABULARY, 1), [2, 3], 4, WARM)) < 1e-6


def test_a_drafter_that_is_the_model_is_always_accepted() -> None:
    trunk = table(VOCABULARY, 1)
    model = Chain(trunk)
    found = generate_with_drafts(model, ChainDrafter(trunk), [2, 3], 17, 3, WARM, seed=5)
    assert found.accepted == [3, 3, 3, 3] and len(found.tokens) == 17 and model.forwards == 5


@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_greedy_rows_of_chains_are_those_of_plain_decoding(drafts: int) -> None:
    counts = set()
    for seed in range(12):
        trunk, other = table(7, seed), table(7, seed) + table(7, seed + 50, 1.0)
        plain = generate(Chain(trunk), [1, 2, 3], 23)
        model, drafter = Chain(trunk), ChainDrafter(other)
        found = generate_with_drafts(model, drafter, [1, 2, 3], 23, drafts)
        assert found.tokens == plain and model.forwards == 1 + len(found.accepted)
        written = [1, 2, 3, *found.tokens]
        assert model.tokens[: len(written)] == written[: len(model.tokens)], (
            "it remembers what was written and no refused draft"
        )
        head = drafter.chain.tokens  # one behind, and not yet told of the last round
        assert head == written[1 : 1 + len(head)] and len(head) >= 3 + 23 - 2 * (drafts + 1)
        counts |= set(found.accepted)
    assert counts == set(range(drafts + 1)), "drafts were refused and accepted at every position"


def test_a_row_ends_after_a_stop_token() -> None:
    trunk = table(7, 3)
    plain = generate(Chain(trunk), [1, 2], 40, WARM, 9)
    assert generate(Chain(trunk), [1, 2], 40, WARM, 9, stop={plain[5]}) == plain[: plain.index(plain[5]) + 1]
    whole = generate_with_drafts(Chain(trunk), ChainDrafter(trunk), [1, 2], 40, 3, WARM, 9).tokens
    stopped = generate_with_drafts(Chain(trunk), ChainDrafter(trunk), [1, 2], 40, 3, WARM, 9, stop={whole[6]})
    assert stopped.tokens == whole[: whole.index(whole[6]) + 1]


def test_one_token_needs_no_drafts_and_an_empty_prompt_is_refused() -> None:
    trunk = table(5, 1)
    found = generate_with_drafts(Chain(trunk), ChainDrafter(trunk), [3], 1, 4)
    assert found.accepted == [] and found.tokens == generate(Chain(trunk), [3], 1)
    with pytest.raises(TextError, match="the prompt is empty"):
        generate(Chain(trunk), [], 3)


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_greedy_rows_of_every_layout_are_those_of_plain_decoding(options: dict[str, Any]) -> None:
    """Six tokens, so that the drafts of a random head are right now and then."""
    source = few_tokens(tiny_source(**{k: v for k, v in options.items() if k != "shards"}), 6)
    map = map_of(source)
    trunk, head = Trunk(source, map), MtpHead(source, map)
    decoder, counts = Decoder(trunk), list[int]()
    for prompt in ([0, 3, 2, 5, 4, 1, 1], [5], [4, 0, 0, 2]):
        plain = generate(decoder.begin(), prompt, 16)
        whole = trunk.greedy(trunk.forward(torch.tensor([[*prompt, *plain]])))[0, len(prompt) - 1 : -1]
        assert plain == whole.tolist(), "plain decoding writes what the whole forward would"
        found = generate_with_drafts(decoder.begin(), head.begin(), prompt, 16, 3)
        assert found.tokens == plain
        counts += found.accepted
    assert 0 in counts, "no draft was ever refused"


def test_sampled_rows_of_a_checkpoint_have_its_distribution() -> None:
    """Two tokens after the first, which no draft has touched, against the probabilities of the whole forward."""
    source = few_tokens(tiny_source(moe=True), 5)
    map = map_of(source)
    trunk, head, decoder = Trunk(source, map), MtpHead(source, map), Decoder(Trunk(source, map))
    prompt, how = [4, 0, 2], Sampling(temperature=1.3, top_k=4)
    every = torch.tensor([[*prompt, *sequence] for sequence in sequences(5, 3)])
    logits = trunk.logits(trunk.forward(every))
    expected = dict.fromkeys(sequences(5, 3), 1.0)
    for row, sequence in enumerate(sequences(5, 3)):
        for place, token in enumerate(sequence):
            expected[sequence] *= allowed(logits[row, 2 + place], how)[token]
    rows = [generate_with_drafts(decoder.begin(), head.begin(), prompt, 3, 2, how, seed) for seed in range(160)]
    accepted = [count for row in rows for count in row.accepted]
    assert 0 in accepted and 1 in accepted and 2 in accepted
    assert chi_square([tuple(row.tokens) for row in rows], expected) > 1e-3
