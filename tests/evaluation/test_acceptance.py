import pytest
import torch

from qwench.evaluation.acceptance import acceptance, accepted, draft_tokens


def test_acceptance_of_hand_made_drafts():
    trunk = torch.tensor([[9, 1, 2, 3, 4, 5]])  # after position t
    first = torch.tensor([[1, 2, 0, 4, 5]])  # entry t is for the place after position t + 1: wrong at t = 2
    second = torch.tensor([[2, 0, 4, 5]])  # after t + 2: wrong at t = 1; right at t = 2, where the first was wrong
    result = accepted(trunk, [first, second])
    assert result.tolist() == [[[True, True], [True, False], [False, False], [True, True]]]


def test_a_position_counts_only_where_all_before_it_agreed():
    trunk = torch.arange(20).view(2, 10)
    right = [trunk[:, k:] for k in (1, 2, 3)]
    assert accepted(trunk, right).all()
    wrong_first = [right[0] + 100, *right[1:]]
    assert not accepted(trunk, wrong_first).any()
    wrong_second = accepted(trunk, [right[0], right[1] + 100, right[2]])
    assert wrong_second[..., 0].all() and not wrong_second[..., 1:].any()


def test_shares_are_over_all_drafts_and_fall_with_position():
    trunk = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    drafts = [torch.tensor([[1, 2, 0, 4], [6, 7, 8, 9]]), torch.tensor([[2, 0, 4], [7, 0, 9]])]
    shares = acceptance(accepted(trunk, drafts))
    assert [s.mean for s in shares] == [pytest.approx(5 / 6), pytest.approx(3 / 6)]
    first = [2 / 3, 3 / 3]
    assert shares[0].standard_error == pytest.approx(abs(first[0] - first[1]) / 2)  # of two means: half their distance


class Successor:
    """A trunk over the integers: embedding and head are the identity on one-hot vectors."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def embed(self, ids):
        return torch.nn.functional.one_hot(ids, self.vocabulary).float()

    def greedy(self, hidden):
        return hidden.argmax(-1)


class CountingOn:
    """A head that drafts the successor of the token it read, and is wrong by one in its third step."""

    def drafts(self, hidden, embedded, steps):
        assert len(hidden) == len(embedded) == 1
        return [embedded[:, k:].roll(2 if k == 3 else 1, dims=-1) for k in range(1, steps + 1)]


def test_drafts_of_a_head_meet_the_trunks_choice_of_the_same_place():
    vocabulary = 17
    ids = torch.stack([(start + torch.arange(9)) % vocabulary for start in (0, 5, 11)])
    trunk_choice = (ids + 1) % vocabulary
    drafts = draft_tokens(Successor(vocabulary), CountingOn(), torch.zeros(3, 9, vocabulary), ids)
    assert [d.shape for d in drafts] == [(3, 8), (3, 7), (3, 6)]
    shares = acceptance(accepted(trunk_choice, drafts))
    assert [(s.mean, s.standard_error) for s in shares] == [(1.0, 0.0), (1.0, 0.0), (0.0, 0.0)]
