"""Factors for the experts that stay: the least-squares problem as it is, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwench.methods.expert_scale import ScaleSums

TOKENS, CHOSEN, EXPERTS, HIDDEN = 61, 3, 7, 5


def random_layer(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:CHOSEN] for _ in range(TOKENS)])
    return chosen, torch.randn(TOKENS, CHOSEN, HIDDEN, generator=generator)


def mixture(chosen: Tensor, contributions: Tensor, factors: Tensor) -> Tensor:
    return (factors[chosen][..., None] * contributions).sum(1)


def sums_of(chosen: Tensor, contributions: Tensor, wanted: Tensor) -> ScaleSums:
    sums = ScaleSums.zero(EXPERTS)
    for part in torch.split(torch.arange(len(chosen)), 17):
        sums.add(chosen[part], contributions[part], wanted[part])
    return sums


def test_the_error_of_any_factors_is_that_of_the_mixture_written_out() -> None:
    chosen, contributions = random_layer(1)
    wanted = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
    factors = torch.linspace(0.3, 1.9, EXPERTS)
    expected = (wanted - mixture(chosen, contributions, factors)).square().sum() / wanted.square().sum()
    assert sums_of(chosen, contributions, wanted).error(factors.double()) == pytest.approx(float(expected), rel=1e-5)


def test_factors_that_are_there_are_found() -> None:
    chosen, contributions = random_layer(3)
    true = torch.tensor([0.5, 2.0, 1.25, 0.75, 1.0, 1.5, 1.0])
    sums = sums_of(chosen, contributions, mixture(chosen, contributions, true))
    found = sums.factors()
    assert found.tolist() == pytest.approx(true.tolist(), abs=0.02), "a hundredth of the diagonal pulls towards 1"
    assert float(found[-1]) == 1.0, "no token is sent to the last"
    assert sums.error(found) < 1e-3 < sums.error(torch.ones(EXPERTS, dtype=torch.float64))


def test_no_factors_near_the_found_ones_are_better() -> None:
    chosen, contributions = random_layer(4)
    wanted = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5))
    sums = sums_of(chosen, contributions, wanted)
    found, one = sums.factors(), torch.ones(EXPERTS, dtype=torch.float64)

    def pulled(factors: Tensor) -> float:
        return sums.error(factors) * sums.energy + 0.01 * float((sums.products.diagonal() * (factors - one).square()).sum())

    for expert in range(EXPERTS - 1):
        for step in (-0.01, 0.01):
            other = found.clone()
            other[expert] += step
            assert pulled(other) > pulled(found)
