from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwench.methods import eora as module
from qwench.methods.eora import correction, eora
from qwench.methods.gptq import GptqOptions, gptq
from qwench.numerics import SCHEMES, Quantized, decode, encode
from tests.methods import toys
from tests.references import eora as literal

TOKENS = 700
INT4 = replace(SCHEMES["int4"], group=16)
SHAPES = [(40, 96), (96, 48), (64, 64)]


def second_moment(columns: int, seed: int = 11, tokens: int = TOKENS) -> Tensor:
    mixed = toys.random(tokens, columns, seed=seed) @ (torch.eye(columns) + toys.random(columns, columns, seed=seed + 1) / 6)
    mixed *= torch.logspace(-1, 1, columns)
    return mixed.T @ mixed


def rounded(shape: tuple[int, int]) -> tuple[Tensor, Quantized, Tensor]:
    """A weight, its rounding, and the error [out, in]."""
    weight = toys.random(*shape, seed=sum(shape))
    quantized = encode(weight, INT4)
    return weight, quantized, weight - decode(quantized)


def product(quantized: Quantized) -> Tensor:
    assert quantized.low_rank is not None
    right, left = quantized.low_rank
    return left.float() @ right.float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 30])
def test_equals_the_literal_version(shape: tuple[int, int], rank: int) -> None:
    weight, quantized, error = rounded(shape)
    second = second_moment(shape[1])
    found, report = eora(weight, quantized, second, TOKENS, rank, torch.float32)
    right, left = literal.eigenspace(error.numpy(), second.numpy(), rank)
    expected = torch.from_numpy(left @ right).float()
    assert (product(found) - expected).abs().max() < 1e-3 * expected.abs().max()
    before = literal.loss(error.numpy(), second.numpy())
    assert report.loss_before == pytest.approx(before / TOKENS, rel=1e-4)
    assert report.loss == pytest.approx(literal.loss(error.numpy() - left @ right, second.numpy()) / TOKENS, rel=1e-3)
    assert report.compared_rows == shape[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_where_inputs_leave_directions_open_it_loses_the_same_and_stays_nearer(shape: tuple[int, int]) -> None:
    """20 tokens: H has rank 20."""
    weight, quantized, error = rounded(shape)
    second = second_moment(shape[1], tokens=20)
    found, _ = eora(weight, quantized, second, 20, 8, torch.float32)
    right, left = literal.eigenspace(error.numpy(), second.double().numpy(), 8)
    losses = [literal.loss(error.numpy() - b, second.numpy()) for b in (product(found).numpy(), left @ right)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert (error - product(found)).norm() < (error - torch.from_numpy(left @ right)).norm()
    assert (error - product(found)).norm() < error.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rank_loses_less(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, quantized, _ = rounded(shape)
    left = [eora(weight, quantized, second_moment(shape[1]), TOKENS, rank, dtype)[1].relative for rank in (1, 2, 4, 8, 16, 32)]
    assert all(more < less for less, more in itertools.pairwise(left))
    assert left[0] < 1


@pytest.mark.parametrize("shape", SHAPES)
def test_beats_the_correction_that_does_not_look_at_inputs(shape: tuple[int, int]) -> None:
    weight, quantized, error = rounded(shape)
    second = second_moment(shape[1])
    _, report = eora(weight, quantized, second, TOKENS, 8)
    plain = literal.loss(error.numpy() - literal.plain(error.numpy(), 8), second.numpy()) / TOKENS
    assert report.loss < 0.9 * plain


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_corrects_everything(shape: tuple[int, int]) -> None:
    weight, quantized, error = rounded(shape)
    found, report = eora(weight, quantized, second_moment(shape[1]), TOKENS, 1000, torch.float32)
    assert report.rank == min(shape)
    assert (product(found) - error).abs().max() < 1e-5
    assert report.relative < 1e-9
    assert decode(found) + product(found) == pytest.approx(weight, abs=1e-5)


def test_an_error_of_low_rank_is_corrected_exactly() -> None:
    quantized = encode(toys.random(40, 96, seed=1), INT4)
    error = toys.random(40, 3, seed=2) @ toys.random(3, 96, seed=3)
    found, report = eora(decode(quantized) + error, quantized, second_moment(96), TOKENS, 5, torch.float32)
    assert report.relative < 1e-9
    assert (product(found) - error).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(150, 210), (210, 150)])
@pytest.mark.parametrize("rank", [1, 4])
def test_large_matrices_are_solved_nearly_as_well(shape: tuple[int, int], rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, quantized, error = toys.random(*shape, seed=7), None, None
    quantized = encode(weight, replace(INT4, group=shape[1] // 10))
    error, second = weight - decode(quantized), second_moment(shape[1])
    exact = correction(error, second, rank)
    monkeypatch.setattr(module, "EXACT_UP_TO", 0)
    near = correction(error, second, rank)
    losses = [literal.loss((error - left @ right).numpy(), second.numpy()) for left, right in (exact, near)]
    assert losses[0] * (1 - 1e-6) <= losses[1] <= losses[0] * 1.001
    assert not torch.equal(exact[0], near[0])
    assert (near[0].T @ near[0] - torch.eye(rank)).abs().max() < 1e-5
    again = correction(error, second, rank)
    assert torch.equal(near[0], again[0])


def test_factors_are_stored_short_and_even() -> None:
    weight, quantized, _ = rounded((40, 96))
    found, report = eora(weight, quantized, second_moment(96), TOKENS, 8)
    assert found.low_rank is not None
    right, left = found.low_rank
    assert (tuple(right.shape), tuple(left.shape)) == ((8, 96), (40, 8))
    assert right.dtype == left.dtype == torch.bfloat16
    assert (right.float().norm(dim=1) / left.float().norm(dim=0)).log().abs().max() < 0.02
    exact = eora(weight, quantized, second_moment(96), TOKENS, 8, torch.float32)[1]
    assert report.loss == pytest.approx(exact.loss, rel=1e-3)
    assert torch.equal(found.codes, quantized.codes)
    assert quantized.low_rank is None


def test_nothing_lost_leaves_nothing_to_correct() -> None:
    quantized = encode(toys.random(40, 96, seed=1), INT4)
    found, report = eora(decode(quantized), quantized, second_moment(96), TOKENS, 8)
    assert product(found).count_nonzero() == 0
    assert (report.loss_before, report.loss, report.relative) == (0, 0, 0)


@pytest.mark.parametrize("order", ["static", "dynamic"])
def test_goes_on_from_gptq_with_the_same_moment(order: str) -> None:
    weight, second = toys.random(80, 96, seed=4), second_moment(96)
    (quantized,), before = gptq([weight], second, TOKENS, INT4, GptqOptions(order=order))  # type: ignore[arg-type]
    found, report = eora(weight, quantized, second, TOKENS, 8)
    assert report.loss_before == pytest.approx(before.loss, rel=1e-3)
    assert report.relative < 0.95
    assert found.group_of_column is quantized.group_of_column


@pytest.mark.parametrize(("fill", "tokens"), [(0.0, TOKENS), (float("nan"), TOKENS), (1.0, 0)])
def test_without_inputs_it_corrects_the_error_itself_and_says_so(fill: float, tokens: int) -> None:
    weight, quantized, error = rounded((40, 96))
    found, report = eora(weight, quantized, torch.full((96, 96), fill), tokens, 8, torch.float32)
    assert report.fallback is not None
    assert (product(found) - torch.from_numpy(literal.plain(error.numpy(), 8)).float()).abs().max() < 1e-4


def test_losses_of_many_rows_are_those_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, quantized, _ = rounded((96, 48))
    _, whole = eora(weight, quantized, second_moment(48), TOKENS, 8)
    monkeypatch.setattr(module, "COMPARED_ROWS", 24)
    _, some = eora(weight, quantized, second_moment(48), TOKENS, 8)
    assert some.compared_rows == 24
    assert some.relative == pytest.approx(whole.relative, rel=0.2)


def test_takes_moments_of_either_precision() -> None:
    weight, quantized, _ = rounded((40, 96))
    second = second_moment(96)
    reports = [
        eora(weight.to(dtype), quantized, second.double(), TOKENS, 8)[1].loss for dtype in (torch.float32, torch.bfloat16)
    ]
    assert reports[0] == pytest.approx(reports[1], rel=0.05)
