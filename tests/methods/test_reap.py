from __future__ import annotations

from dataclasses import astuple
from typing import get_args

import pytest
import torch
from torch import Tensor

from qwench.methods.reap import Criterion, SaliencySums, keep, keep_complaint, observe, observe_expert, renormalised
from tests.references import reap as literal

TOKENS, EXPERTS, TOP_K, HIDDEN = 57, 11, 3, 6
UNUSED = 4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Layer:
    """A mixture of linear experts of very different sizes; one of them is never chosen."""

    def __init__(self) -> None:
        self.tokens = random(TOKENS, HIDDEN, seed=1)
        self.logits = random(TOKENS, EXPERTS, seed=2) + torch.arange(EXPERTS) * 0.2
        self.logits[:, UNUSED] = -50
        self.experts = random(EXPERTS, HIDDEN, HIDDEN, seed=3) * torch.logspace(-1, 1, EXPERTS).flip(0).view(-1, 1, 1)
        probabilities, self.indices = torch.topk(self.logits.softmax(-1), TOP_K)
        self.weights = renormalised(probabilities)
        outputs = torch.einsum("tkij,tj->tki", self.experts[self.indices], self.tokens)
        self.norms = outputs.norm(dim=-1)

    def sums(self, tokens: Tensor) -> SaliencySums:
        return observe(self.weights[tokens], self.indices[tokens], self.norms[tokens], EXPERTS)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


@pytest.fixture(scope="module")
def seen(layer: Layer) -> list[list[tuple[float, float]]]:
    run = [lambda x, m=matrix: (m @ torch.tensor(x, dtype=torch.float64)).tolist() for matrix in layer.experts]
    return literal.contributions(layer.tokens.tolist(), layer.logits.tolist(), run, TOP_K)


@pytest.mark.parametrize("criterion", get_args(Criterion))
def test_equals_the_literal_version(layer: Layer, seen: list[list[tuple[float, float]]], criterion: Criterion) -> None:
    got = layer.sums(torch.arange(TOKENS)).saliency(criterion)
    assert got.tolist() == pytest.approx(literal.saliency(seen, criterion), rel=1e-12)


def test_criteria_do_not_rank_alike(layer: Layer) -> None:
    sums = layer.sums(torch.arange(TOKENS))
    kept = {criterion: tuple(keep(sums.saliency(criterion), 5, TOP_K)) for criterion in ("reap", "frequency", "weight_sum")}
    assert kept["reap"] != kept["frequency"]


def test_weights_before_renormalising_give_another_saliency(layer: Layer) -> None:
    raw = torch.topk(layer.logits.softmax(-1), TOP_K).values
    right, wrong = layer.sums(torch.arange(TOKENS)), observe(raw, layer.indices, layer.norms, EXPERTS)
    assert not torch.allclose(right.saliency(), wrong.saliency(), rtol=0.05)
    assert torch.allclose(layer.weights.sum(-1), torch.ones(TOKENS, dtype=torch.float64))


def test_sums_add_up_in_any_order_and_partition(layer: Layer) -> None:
    whole = layer.sums(torch.arange(TOKENS))
    shuffled = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(4))
    parts = sum((layer.sums(part) for part in shuffled.split([1, 30, 19, 7])), SaliencySums.zero(EXPERTS))
    for got, want in zip(astuple(parts), astuple(whole), strict=True):
        assert torch.allclose(got.double(), want.double(), rtol=1e-13, atol=0)
    assert torch.equal(parts.tokens, whole.tokens)
    assert keep(parts.saliency(), 6, TOP_K) == keep(whole.saliency(), 6, TOP_K)


def test_one_expert_at_a_time_is_the_same(layer: Layer) -> None:
    total = SaliencySums.zero(EXPERTS)
    for expert in range(EXPERTS):
        token, place = torch.nonzero(layer.indices == expert, as_tuple=True)
        outputs = layer.tokens[token] @ layer.experts[expert].T
        total = total + observe_expert(expert, layer.weights[token, place], outputs.float(), EXPERTS)
    assert torch.allclose(total.saliency(), layer.sums(torch.arange(TOKENS)).saliency(), rtol=1e-6)


def test_norms_of_bfloat16_outputs_are_taken_in_float32() -> None:
    outputs = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert observe_expert(0, torch.ones(1), outputs, 1).norm.tolist() == [64.0]


def test_experts_that_saw_no_token_are_named_and_score_zero(layer: Layer) -> None:
    sums = layer.sums(torch.arange(TOKENS))
    assert sums.never_hit == [UNUSED]
    for criterion in get_args(Criterion):
        assert float(sums.saliency(criterion)[UNUSED]) == 0
    assert UNUSED not in keep(sums.saliency(), EXPERTS - 1, TOP_K)
    assert SaliencySums.zero(EXPERTS).never_hit == list(range(EXPERTS))


def test_of_equals_the_lower_number_stays() -> None:
    saliency = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    assert keep(saliency, 3, 2) == [1, 2, 3]
    assert keep(torch.zeros(300), 150, 8) == list(range(150))


def test_what_cannot_be_kept_is_refused(layer: Layer) -> None:
    saliency = layer.sums(torch.arange(TOKENS)).saliency()
    assert keep_complaint(saliency, TOP_K, TOP_K) is None
    assert keep_complaint(saliency, 2, 3) == "2 experts are to be kept, but the router sends every token to 3"
    assert keep_complaint(saliency, 12, 3) == "12 experts are to be kept, the layer has 11"
    with pytest.raises(AssertionError, match="every token to 3"):
        keep(saliency, 2, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("criterion", ["reap", "norm_mean", "norm_max"])
def test_a_norm_that_is_not_finite_is_refused_by_name(layer: Layer, value: float, criterion: Criterion) -> None:
    norms = layer.norms.clone()
    norms[5, 1] = value
    broken = int(layer.indices[5, 1])
    saliency = observe(layer.weights, layer.indices, norms, EXPERTS).saliency(criterion)
    complaint = keep_complaint(saliency, 6, TOP_K)
    assert complaint is not None
    assert f"experts [{broken}] of 11 is not finite" in complaint
