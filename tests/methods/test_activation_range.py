"""The range of an activation: what was seen is what is counted, and each choice finds what it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qwench.methods.activation_range import FACTORS, BlockSizes, Examples, chosen_range, divisor
from qwench.numerics import outer_scale
from qwench.numerics.activation import round_nvfp4


def tokens(count: int = 300, seed: int = 1) -> Tensor:
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(seed))


def seen(inputs: Tensor, examples: bool = False, batch: int = 64) -> BlockSizes:
    sizes = BlockSizes(examples=Examples() if examples else None)
    for part in torch.split(inputs, batch):
        sizes.add(part)
    return sizes


def test_blocks_are_counted_whatever_the_batches_and_in_any_order() -> None:
    x = tokens()
    whole, parts = seen(x, batch=300), seen(x[:100]) + seen(x[100:])
    assert whole.tokens == parts.tokens == 300 and whole.amax == parts.amax == float(x.abs().max())
    assert torch.equal(whole.counts, parts.counts) and int(whole.counts.sum()) == 300 * 3
    assert torch.equal(seen(x.flip(0)).counts, whole.counts)
    assert torch.equal(seen(x.bfloat16()).counts, seen(x.bfloat16().float()).counts)


def test_tokens_that_are_not_finite_are_left_out_and_counted() -> None:
    x = tokens()
    x[7, 3], x[8, 0], x[9, 47] = math.nan, math.inf, -math.inf
    sizes = seen(x)
    assert sizes.left_out == 3 and sizes.tokens == 297
    assert torch.equal(sizes.counts, seen(torch.cat([x[:7], x[10:]])).counts)
    nothing = seen(torch.full((5, 16), math.nan))
    assert (nothing.tokens, nothing.left_out, nothing.amax) == (0, 5, 0.0)


@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 99.99, 100.0])
def test_a_percentile_holds_its_share_of_blocks(percentile: float) -> None:
    x = tokens(4000)
    largest = x.view(-1, 16).abs().amax(1)
    found = chosen_range(seen(x), "percentile", percentile)
    share = float((largest <= found).double().mean())
    assert share >= percentile / 100
    exact = float(torch.quantile(largest.double(), percentile / 100, interpolation="higher"))
    assert exact <= found <= exact * (1 + 1 / 32), "a bin is a 32nd of a binary order wide"


def test_shares_of_blocks_that_are_cut_off_or_coarse() -> None:
    x = torch.zeros(10, 16)
    x[:, 0] = torch.tensor([0.0, 0, 1e-6, 1e-5, 1.0, 1, 1, 2, 4, 64])
    sizes = seen(x)
    assert sizes.share_above(8.0) == pytest.approx(0.1) and sizes.share_above(64.0) == 0
    assert sizes.share_coarse(8.0) == pytest.approx(0.2), "zeros are exact"
    assert sizes.share_coarse(1e-2) == 0


def test_nothing_but_zeros_has_a_divisor_too() -> None:
    sizes = seen(torch.zeros(4, 32), examples=True)
    for choice in ("amax", "percentile", "mse"):
        assert chosen_range(sizes, choice) == 0.0  # type: ignore[arg-type]
    assert divisor(0.0) == 1.0 and chosen_range(BlockSizes()) == 0.0


def test_a_divisor_is_a_number_of_bfloat16_that_cuts_nothing_off() -> None:
    for largest in (1e-8, 0.3, 4.776, 108.6, 3e5, 1e30):
        found, exact = divisor(largest), float(outer_scale(largest))
        assert found == float(torch.tensor(found).bfloat16()) and 0.992 * exact < found <= exact


def true_error(x: Tensor, largest: float) -> float:
    return float((round_nvfp4(x, divisor(largest)) - x).double().square().sum())


def test_mse_keeps_the_range_where_nothing_is_gained() -> None:
    x = tokens(2000)
    sizes = seen(x, examples=True)
    assert chosen_range(sizes, "mse") >= 0.9 * sizes.amax


def test_mse_cuts_off_where_one_outlier_would_cost_all_others_their_precision() -> None:
    """One block a million times larger than a hundred thousand others, which amax would round to zero; weighed by what is lost of each."""
    x = tokens(40_000) * 2.0
    x[17, 5] = 2.0**13 * 48
    small, sizes = x * 2.0**-12, None
    small[17, 5] = 120.0
    sizes = seen(small, examples=True)
    found = chosen_range(sizes, "mse")
    errors = {factor: true_error(small, factor * sizes.amax) for factor in FACTORS}
    best = min(errors, key=lambda factor: errors[factor])
    assert true_error(small, found) <= 1.2 * errors[best], "examples stand for all blocks"
    assert true_error(small, found) <= true_error(small, sizes.amax)


def test_examples_are_few_and_every_order_has_some() -> None:
    x = tokens(3000)
    x[5, :16] *= 2.0**20
    sizes = seen(x, examples=True)
    assert sizes.examples is not None
    kept = sizes.examples.blocks
    assert max(len(blocks) for blocks in kept.values()) == 32 and sum(map(len, kept.values())) < 300
    assert torch.equal(kept[max(kept)], x[5, None, :16]), "the rare large block is among them"
    every = {tuple(row.tolist()) for row in x.view(-1, 16)}
    assert all(tuple(row.tolist()) in every for blocks in kept.values() for row in blocks)
    both = (sizes + seen(tokens(200, seed=5), examples=True)).examples
    assert both is not None and max(map(len, both.blocks.values())) == 32
