import math

import pytest
import torch

from qwench.errors import CheckpointError, UserError
from qwench.evaluation import sampling
from qwench.evaluation.sampling import Sampling, draw, judge, nucleus, residual
from tests.support.chains import chi_square

LOGITS = torch.tensor([[2.0, 0.5, 1.0, -1.0, 1.5], [0.0, 3.0, 2.9, 2.8, -2.0]])


def test_temperature_divides_logits():
    found = Sampling(temperature=0.5).distribution(LOGITS)
    weights = [math.exp(x / 0.5) for x in LOGITS[0].tolist()]
    assert found.dtype == torch.float64
    assert found[0].tolist() == pytest.approx([w / sum(weights) for w in weights])


def test_temperature_nought_is_one_token_and_the_first_of_several():
    assert Sampling().distribution(LOGITS).argmax(-1).tolist() == [0, 1]
    assert Sampling().distribution(torch.tensor([1.0, 4.0, 4.0])).tolist() == [0.0, 1.0, 0.0]


def test_top_k_keeps_the_most_likely():
    found = Sampling(temperature=1.0, top_k=2).distribution(LOGITS)
    assert (found > 0).tolist() == [[True, False, False, False, True], [False, True, True, False, False]]
    assert found[0, 0] / found[0, 4] == pytest.approx(math.exp(0.5)) and found.sum(-1).tolist() == pytest.approx([1, 1])
    assert torch.equal(Sampling(1.0, 99).distribution(LOGITS), Sampling(1.0).distribution(LOGITS))


def test_top_p_keeps_the_fewest_that_reach_it():
    p = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    assert nucleus(p, 0.39).tolist() == [0, 1, 0, 0]
    assert nucleus(p, 0.5).tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert nucleus(p, 0.75).tolist() == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9])
    assert nucleus(p, 1.0).tolist() == p.tolist()


def test_top_p_is_applied_to_what_top_k_left():
    found = Sampling(temperature=1.0, top_k=3, top_p=0.6).distribution(LOGITS[1])
    share = torch.tensor([3.0, 2.9, 2.8]).double().softmax(0)
    assert share[0] < 0.6 < share[:2].sum() and found.tolist() == pytest.approx(
        [0, *(share[:2] / share[:2].sum()).tolist(), 0, 0], abs=1e-7
    )


@pytest.mark.parametrize("wrong", [dict(temperature=-0.1), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1)])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="cannot sample with"):
        Sampling(**wrong)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(CheckpointError, match="not finite"):
        Sampling().distribution(torch.tensor([0.0, float("nan")]))


def distributions(count, seed, vocabulary=5):
    logits = 1.5 * torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed))
    return Sampling(temperature=1.0).distribution(logits)


def first_tokens(p, q, draws):
    """What stands in the place of the first draft after judging, over and over."""
    generator, found = torch.Generator().manual_seed(3), []
    for _ in range(draws):
        token = draw(q[0], generator)
        count, after = judge(p, q, [token], generator)
        found.append((token if count else after,))
    return found


def test_a_judged_draft_has_the_models_distribution():
    p, q = distributions(2, 1), distributions(1, 2)
    expected = {(token,): float(share) for token, share in enumerate(p[0])}
    assert (p[0] - q[0]).abs().sum() > 0.5, "else any rule would do"
    assert chi_square(first_tokens(p, q, 4000), expected) > 1e-3


@pytest.mark.parametrize("mistake", ["the model's own in place of the residual", "every draft accepted"])
def test_wrong_rules_do_not(mistake, monkeypatch):
    p, q = distributions(2, 1), distributions(1, 2)
    expected = {(token,): float(share) for token, share in enumerate(p[0])}
    if mistake.startswith("every"):
        found = [(draw(q[0], g),) for g in [torch.Generator().manual_seed(3)] for _ in range(4000)]
    else:
        monkeypatch.setattr(sampling, "residual", lambda p, q: p)
        found = first_tokens(p, q, 4000)
    assert chi_square(found, expected) < 1e-9


def test_acceptance_is_the_overlap_of_the_two_distributions():
    """Leviathan et al., Theorem 3.5: the probability of acceptance is the sum of min(p, q)."""
    p, q, generator = distributions(2, 1), distributions(1, 2), torch.Generator().manual_seed(5)
    share = sum(judge(p, q, [draw(q[0], generator)], generator)[0] for _ in range(4000)) / 4000
    overlap = float(torch.minimum(p[0], q[0]).sum())
    assert 0.2 < overlap < 0.8 and abs(share - overlap) < 4 * math.sqrt(overlap * (1 - overlap) / 4000)


def test_greedy_judging_is_agreement():
    one = torch.eye(4, dtype=torch.float64)
    generator = torch.Generator()
    assert judge(one[[2, 0, 3, 1]], one[[2, 0, 3]], [2, 0, 3], generator) == (3, 1)  # the bonus
    assert judge(one[[2, 0, 3, 1]], one[[2, 1, 3]], [2, 1, 3], generator) == (
        1,
        0,
    )  # the model's own; the third draft is never looked at
    assert judge(one[[2, 0, 3, 1]], one[[0, 0, 3]], [0, 0, 3], generator) == (0, 2)


def test_the_residual_is_what_the_model_has_more():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.7, 0.1]).double()
    assert residual(p, q).tolist() == pytest.approx([0.3, 0, 0.1])
    assert residual(p, p).tolist() == p.tolist()
