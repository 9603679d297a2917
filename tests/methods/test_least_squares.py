"""Corrections of a weight by least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.methods.least_squares import correction

TOKENS, INPUTS, OUTPUTS = 97, 11, 5


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_what_is_missing_is_found() -> None:
    read, true = random(TOKENS, INPUTS, seed=1), random(OUTPUTS, INPUTS, seed=2)
    torch.testing.assert_close(correction(read, read @ true.T, pull=1e-12), true, rtol=1e-6, atol=1e-9)


def test_nothing_near_it_is_better() -> None:
    read, missing = random(TOKENS, INPUTS, seed=3), random(TOKENS, OUTPUTS, seed=4)

    def cost(change: Tensor) -> float:
        size = float((read.T @ read).diagonal().mean())
        return float((missing - read @ change.T).square().sum()) + 0.25 * size * float(change.square().sum())

    found = correction(read, missing, pull=0.25)
    for seed in range(20):
        assert cost(found + 1e-3 * random(OUTPUTS, INPUTS, seed=10 + seed)) > cost(found)


def test_a_direction_that_no_token_shows_is_left_alone() -> None:
    read, missing = random(TOKENS, INPUTS, seed=5), random(TOKENS, OUTPUTS, seed=6)
    read[:, 4] = 0
    found = correction(read, missing)
    assert bool(found.isfinite().all()) and bool((found[:, 4] == 0).all()) and bool((found[:, 3] != 0).all())


def test_without_tokens_nothing_changes() -> None:
    assert correction(torch.zeros(0, 3), torch.zeros(0, 2)).tolist() == [[0.0] * 3] * 2
    assert correction(torch.zeros(4, 3), torch.ones(4, 2)).tolist() == [[0.0] * 3] * 2
