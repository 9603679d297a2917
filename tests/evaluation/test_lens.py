"""KL after every layer: against distributions worked out by hand, and against hidden states of transformers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qwench.checkpoint.reader import Checkpoint
from qwench.evaluation.divergence import measure_tokens
from qwench.evaluation.lens import POSITIONS, divergence_by_layer, divergence_of_parts, lens_positions
from qwench.evaluation.lockstep import read_in_lockstep
from qwench.models import map_of
from qwench.models.run import Trunk
from tests.support.oracle import write_runnable

ROWS, LENGTH, CHOSEN = 3, 17, 13


def parts(logits: Tensor, size: int) -> list[tuple[slice, Tensor]]:
    count = logits.shape[-1]
    return [(slice(i, min(i + size, count)), logits[:, i : i + size]) for i in range(0, count, size)]


def literal(source: Tensor, release: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(source.double(), -1), torch.log_softmax(release.double(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("size", [1, 7, 23, 100])
def test_parts_of_the_vocabulary_add_up_to_the_whole(size: int) -> None:
    generator = torch.Generator().manual_seed(4)
    source = 2 * torch.randn(5, 23, generator=generator) + torch.tensor([[0.0], [300.0], [-300.0], [4.0], [0.0]])
    release = source + 0.7 * torch.randn(5, 23, generator=generator) - 40
    found = divergence_of_parts(parts(source, size), parts(release, size))
    torch.testing.assert_close(found, literal(source, release), rtol=1e-9, atol=1e-11)
    assert float(found.min()) > 1e-3 and found.dtype == torch.float64


def test_known_distributions_and_their_direction() -> None:
    p, q = [0.5, 0.25, 0.25], [0.125, 0.75, 0.125]
    one, other = torch.tensor([p]).log() + 3, torch.tensor([q]).log() - 1
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(divergence_of_parts(parts(one, 2), parts(other, 2))) == pytest.approx(expected, abs=1e-6)
    assert float(divergence_of_parts(parts(other, 2), parts(one, 2))) != pytest.approx(expected, abs=1e-2)
    assert float(divergence_of_parts(parts(one, 2), parts(one.clone(), 2))) == 0


def test_small_divergences_keep_their_digits() -> None:
    """Two logarithms cancel: of 1e-6 nats half of the digits must be left."""
    source = 4 * torch.randn(3, 4001, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    release = source + 1e-3 * torch.randn(3, 4001, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = divergence_of_parts(parts(source, 512), parts(release, 512))
    torch.testing.assert_close(found, literal(source, release), rtol=1e-6, atol=0)
    assert 1e-8 < float(found.max()) < 1e-5


def test_parts_that_are_not_the_same_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="parts of the vocabulary"):
        divergence_of_parts(parts(torch.zeros(1, 4), 2), [(slice(0, 2), torch.zeros(1, 2)), (slice(2, 3), torch.zeros(1, 1))])


@pytest.mark.parametrize(("rows", "length", "count"), [(16, 512, 256), (3, 17, 13), (1000, 9, 256), (2, 4, 256), (1, 2, 5)])
def test_positions_are_spread_evenly_and_never_the_last_of_a_row(rows: int, length: int, count: int) -> None:
    found = lens_positions(rows, length, count)
    scored = [row * length + t for row in range(rows) for t in range(length - 1)]
    assert len(found) == min(count, len(scored)) and set(found.tolist()) <= set(scored)
    places = [scored.index(place) for place in found.tolist()]
    steps = [b - a for a, b in itertools.pairwise(places)]
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1), "the same step everywhere, but for whole numbers"
    assert abs(places[0] - (len(scored) - 1 - places[-1])) <= 1, "as far from the beginning as from the end"
    if count >= rows:
        assert {place // length for place in found.tolist()} == set(range(rows))


def test_few_positions_are_read_however_many_rows_there_are() -> None:
    assert len(lens_positions(64, 4096)) == POSITIONS <= 300


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("lens")
    return [write_runnable(place / f"{seed}", moe=request.param, seed=seed) for seed in (0, 1)]


def test_it_is_what_transformers_says_after_every_layer(folders: list[Path]) -> None:
    """Hidden states, norm and head are transformers'; logits are whole, sums literal. The last layer is the divergence itself."""
    ids = torch.randint(0, 300, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    positions = lens_positions(ROWS, LENGTH, CHOSEN)
    trunks = []
    for folder in folders:
        checkpoint = Checkpoint.open(folder)
        trunks.append(Trunk(checkpoint, map_of(checkpoint)))
    layers = len(trunks[0].map.blocks)
    read = read_in_lockstep(trunks[0], {"release": trunks[1]}, ids, layers, positions=positions)
    source, release = read.source, read.releases["release"]
    found = divergence_by_layer(source.by_layer, release.by_layer, *(lambda h, t=t: t.logit_parts(h, 100) for t in trunks))
    assert found.shape == (layers, CHOSEN)

    logits = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
            assert len(states) == layers + 1
            norm = model.get_decoder().norm
            normed = [*(norm(state) for state in states[1:-1]), states[-1]]  # the last one comes normed already
            logits.append([model.lm_head(state).flatten(0, 1)[positions] for state in normed])
    expected = torch.stack([literal(one, other) for one, other in zip(*logits, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert float(expected.min()) > 1e-4 and len({round(float(layer.mean()), 5) for layer in expected}) == layers

    tokens = measure_tokens(source.normed, release.normed, trunks[0].logits, trunks[1].logits, ids, trunks[0].vocabulary)
    scored = positions - positions // LENGTH  # the last position of each row is not among the tokens
    torch.testing.assert_close(found[-1], tokens.divergence[scored], rtol=1e-4, atol=1e-6)
