from __future__ import annotations

import math
import threading

import pytest
import torch

from qwench.numerics import SCHEMES, encode, finite, largest_magnitude
from qwench.numerics.chunks import ErrorSums, error_sums, round_trip, tiles

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width", "elements"), [(7, 5, 1, None, 10), (300, 450, 128, 128, 40000), (3, 99, 1, None, 8)]
)
def test_tiles_cover_every_element_once(rows: int, columns: int, height: int, width: int | None, elements: int) -> None:
    count = torch.zeros(rows, columns)
    for tile in tiles(rows, columns, height, width, elements):
        tile.of(count).add_(1)
        assert tile.rows.start % height == 0
        assert tile.columns.start % (width or columns) == 0
    assert (count == 1).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_largest_magnitude_is_that_of_the_negative_one(dtype: torch.dtype) -> None:
    weight = torch.linspace(-3, 2, 35).reshape(5, 7).to(dtype)
    assert largest_magnitude(weight) == 3.0
    assert largest_magnitude(weight.t()) == 3.0
    assert largest_magnitude(-weight[2]) == float(weight[2].abs().max())
    assert largest_magnitude(torch.zeros(0, 3, dtype=dtype)) == 0.0
    assert largest_magnitude(-torch.zeros(2, 3, dtype=dtype)) == 0.0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_finite_sees_one_bad_value(dtype: torch.dtype, bad: float) -> None:
    weight = torch.full((300, 700), torch.finfo(dtype).max, dtype=dtype)
    assert finite(weight)
    weight[299, 699] = bad
    assert not finite(weight)
    assert not finite(weight[:, 1:])


@pytest.mark.parametrize("name", SCHEMES)
def test_result_does_not_depend_on_threads(name: str) -> None:
    weight = torch.randn(600, 640, generator=torch.Generator().manual_seed(3)).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(encode(weight, SCHEMES[name]))
    finally:
        torch.set_num_threads(before)
    assert torch.get_num_threads() == before
    for other in results[1:]:
        assert torch.equal(results[0].codes.view(torch.uint8), other.codes.view(torch.uint8))
        assert torch.equal(results[0].scales.view(torch.uint8), other.scales.view(torch.uint8))
        assert results[0].error == other.error


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_error_sums_survive_huge_and_tiny_weights(size: float) -> None:
    weight, error = torch.tensor([[3.0, -4.0]]) * size, torch.tensor([[-0.6, 0.8]]) * size
    found = round_trip([error_sums(error, weight)], 2)
    assert found.mean_abs == pytest.approx(0.7 * size)
    assert found.max_abs == pytest.approx(0.8 * size)
    assert found.relative_rms == pytest.approx(0.2)


def test_round_trip_of_zeros_is_zero() -> None:
    assert round_trip([ErrorSums(0.0, 0.0, 0.0, 0.0)], 4).relative_rms == 0.0


def test_workers_leave_the_number_of_threads_alone() -> None:
    """PyTorch's default for new threads is that of the caller, not that of our workers."""
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(4)
        encode(torch.ones(1100, 640), SCHEMES["int8"])
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [*seen, torch.get_num_threads()] == [4, 4]
    finally:
        torch.set_num_threads(before)
