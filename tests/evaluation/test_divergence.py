import itertools
import math

import pytest
import torch

from qwench.evaluation import divergence
from qwench.evaluation.divergence import HISTOGRAM_EDGES, compare_logits, histogram, measure_tokens

ROWS, LENGTH, HIDDEN, VOCABULARY = 3, 11, 7, 23


@pytest.fixture
def material():
    generator = torch.Generator().manual_seed(5)
    source = torch.randn(ROWS, LENGTH, HIDDEN, generator=generator)
    release = source + 0.3 * torch.randn(ROWS, LENGTH, HIDDEN, generator=generator)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    return source, release, lambda hidden: hidden @ head.T, ids


def test_divergence_of_known_distributions():
    p, q = [0.5, 0.25, 0.25], [0.125, 0.75, 0.125]
    source, release = torch.tensor([p]).log() + 4.0, torch.tensor([q]).log() - 2.5  # softmax ignores the offsets
    chunk = compare_logits(source, release, torch.tensor([2]))
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(chunk.divergence) == pytest.approx(expected, abs=1e-6)
    assert float(chunk.loss_source) == pytest.approx(-math.log(0.25), abs=1e-6)
    assert float(chunk.loss_release) == pytest.approx(-math.log(0.125), abs=1e-6)
    assert int(chunk.greedy_source) == 0 and int(chunk.greedy_release) == 1


def test_divergence_of_two_temperatures_is_analytic():
    """softmax(a x) against softmax(b x): KL = (a - b) E_a[x] - log Z_a + log Z_b."""
    x, a, b = torch.linspace(-3, 2, 41, dtype=torch.float64), 1.0, 1.7
    expected = (a - b) * float((torch.softmax(a * x, 0) * x).sum()) - float((a * x).logsumexp(0)) + float((b * x).logsumexp(0))
    chunk = compare_logits((a * x)[None].float(), (b * x)[None].float(), torch.tensor([0]))
    assert float(chunk.divergence) == pytest.approx(expected, rel=1e-5)


def test_direction_is_source_to_release():
    source, release = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 9.0]])
    forward = compare_logits(source, release, torch.tensor([0])).divergence
    backward = compare_logits(release, source, torch.tensor([0])).divergence
    assert float(forward) == pytest.approx(4.5 - math.log(2) + math.log1p(math.exp(-9)), abs=1e-5)
    assert float(backward) < math.log(2)


def test_identical_models_give_exactly_zero_and_agree_everywhere(material):
    source, _, logits, ids = material
    measures = measure_tokens(source, source.clone(), logits, logits, ids, VOCABULARY)
    assert torch.equal(measures.divergence, torch.zeros(ROWS * (LENGTH - 1), dtype=torch.float64))
    assert bool(measures.agrees.all())
    assert torch.equal(measures.loss_source, measures.loss_release)


@pytest.mark.parametrize("positions", [1, 4, 1000])
def test_chunks_do_not_change_the_result(material, monkeypatch, positions):
    source, release, logits, ids = material
    monkeypatch.setattr(divergence, "CHUNK_BYTES", positions * 4 * VOCABULARY)
    sizes = []

    def counted(hidden):
        sizes.append(len(hidden))
        return logits(hidden)

    measures = measure_tokens(source, release, counted, logits, ids, VOCABULARY)
    assert max(sizes) == min(positions, LENGTH)
    log_p, log_q = (torch.log_softmax(logits(h)[:, :-1].double(), -1) for h in (source, release))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).flatten()
    torch.testing.assert_close(measures.divergence, expected, rtol=1e-5, atol=1e-7)
    expected_loss = -log_q.gather(-1, ids[:, 1:, None]).flatten()
    torch.testing.assert_close(measures.loss_release, expected_loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(measures.greedy_release, logits(release).argmax(-1))
    assert measures.documents.tolist() == [r for r in range(ROWS) for _ in range(LENGTH - 1)]
    assert torch.equal(measures.agrees, (log_p.argmax(-1) == log_q.argmax(-1)).flatten())


def test_a_large_vocabulary_is_cut_into_few_positions():
    assert divergence.positions_per_chunk(248_320) * 248_320 * 4 <= divergence.CHUNK_BYTES
    assert divergence.positions_per_chunk(10**9) == 1


def test_histogram_counts_every_token_in_its_bin():
    values = torch.tensor([0.0, 1e-12, 0.02, 0.02, 1.5, 1e3], dtype=torch.float64)
    edges, counts = histogram(values)
    assert edges == list(HISTOGRAM_EDGES) and len(counts) == len(edges) - 1
    assert sum(counts) == len(values) and counts[0] == 2 and counts[-1] == 1
    for value, expected in ((0.02, 2), (1.5, 1)):
        bin_ = next(i for i in range(len(counts)) if edges[i] <= value < edges[i + 1])
        assert counts[bin_] == expected
    assert all(b / a == pytest.approx(10**0.25) for a, b in itertools.pairwise(edges))
