"""Parts of tensors: shapes and bytes against torch's own indexing, for every kind of index on every dimension."""

from __future__ import annotations

import itertools

import pytest
import torch

from qwench.checkpoint.parts import joined, part_runs, part_shape
from qwench.checkpoint.source import Part
from tests.support.files import bits

STORED = torch.arange(4 * 6 * 10, dtype=torch.int16).reshape(4, 6, 10)
CHOICES = [slice(None), slice(1, 3), slice(2, 2), slice(-3, None), slice(1, 99), 2, -1]
PARTS: list[Part] = [p for n in range(4) for p in itertools.product(CHOICES, repeat=n)]


def test_every_part_is_what_torch_takes() -> None:
    data = bits(STORED)
    for part in PARTS:
        expected = STORED[part]
        assert part_shape((4, 6, 10), part) == tuple(expected.shape), part
        got = b"".join(data[offset : offset + length] for offset, length in part_runs((4, 6, 10), part, 2))
        assert got == bits(expected), part


@pytest.mark.parametrize(
    ("part", "runs"),
    [
        ((), [(0, 480)]),
        ((slice(None), slice(None)), [(0, 480)]),
        ((2,), [(240, 120)]),
        ((2, slice(1, 4)), [(260, 60)]),
        ((slice(1, 3), slice(1, 4)), [(140, 60), (260, 60)]),
        ((slice(0, 2), slice(None)), [(0, 240)]),
    ],
)
def test_what_lies_together_is_one_run(part: Part, runs: list[tuple[int, int]]) -> None:
    assert list(part_runs((4, 6, 10), part, 2)) == runs


def test_scalars_are_one_run() -> None:
    assert list(part_runs((), (), 4)) == [(0, 4)]
    assert part_shape((), ()) == ()


@pytest.mark.parametrize("part", [(4,), (-5,), (0, 6), (0, 0, 0, 0)])
def test_parts_that_do_not_fit(part: Part) -> None:
    with pytest.raises(IndexError, match=r"\[4, 6, 10\]"):
        part_shape((4, 6, 10), part)


def test_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps of 1"):
        part_shape((4, 6, 10), (slice(0, 4, 2),))


@pytest.mark.parametrize(
    "outer", [(), (2,), (slice(1, 4),), (2, slice(1, 5)), (slice(2, 4), slice(0, 6)), (slice(1, 5), 3)], ids=str
)
@pytest.mark.parametrize("inner", [(), (1,), (slice(0, 2),), (0, slice(1, 3)), (slice(None), 2), (-1,)], ids=str)
def test_a_part_of_a_part_is_a_part(outer: Part, inner: Part) -> None:
    numbers = torch.arange(5 * 7 * 11).view(5, 7, 11)
    assert torch.equal(numbers[joined((5, 7, 11), outer, inner)], numbers[outer][inner])
