from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from qwench.methods.clipping import GroupMoments, clipped, search_limits
from qwench.numerics import SCHEMES, Scheme, encode, outer_scale
from tests.methods import toys
from tests.references import awq as literal

INT4 = Scheme("int", 4, group=16, full_range=True)


def case(rows: int = 9, columns: int = 48, tokens: int = 60) -> tuple[Tensor, list[Tensor]]:
    """Weights with a few large ones; correlated inputs in which the columns of the large ones are quiet."""
    weight = toys.random(rows, columns, seed=1)
    weight[:, 5::16] *= 4
    mix = toys.random(columns, columns, seed=2) / 5 + torch.eye(columns)
    x = toys.random(tokens, columns, seed=3) @ mix
    x[:, 5::16] *= 0.1
    return weight, [x[:7], x[7:].reshape(1, -1, columns)]


def moments_of(inputs: list[Tensor], group: int | None) -> Tensor:
    found = GroupMoments(inputs[0].shape[-1], group)
    for batch in inputs:
        found.add(batch)
    return found.sums


def test_equals_the_literal_search() -> None:
    weight, inputs = case()
    found = search_limits(weight, INT4, moments_of(inputs, 16), scale_dtype=torch.float32)
    want = torch.from_numpy(literal.clip(weight.numpy(), torch.cat([x.reshape(-1, 48) for x in inputs]).numpy(), 16))
    assert torch.equal(found.limits, want)
    assert 0.2 < found.clipped_share < 1


@pytest.mark.parametrize(
    "scheme", [INT4, dataclasses.replace(SCHEMES["int4-asym"], group=16), SCHEMES["nvfp4"], SCHEMES["fp8"]]
)
def test_every_group_is_as_good_or_better(scheme: Scheme) -> None:
    weight, inputs = case()
    outer = outer_scale(float(weight.abs().max())) if scheme.kind == "nvfp4" else None
    found = search_limits(weight, scheme, moments_of(inputs, scheme.group), outer)
    x = torch.cat([b.reshape(-1, 48) for b in inputs])
    width = scheme.group or 48

    def errors(candidate: Tensor) -> Tensor:
        difference = (encode(candidate, scheme, outer).dequantize() - weight).view(9, -1, width)
        return torch.einsum("tgi,ogi->tog", x.view(len(x), -1, width), difference).square().sum(0)

    before, after = errors(weight), errors(clipped(weight, found.limits))
    assert (after <= before * (1 + 1e-4)).all()
    assert found.before == pytest.approx(float(before.sum()), rel=1e-4)
    assert found.after == pytest.approx(float(after.sum()), rel=1e-4)
    if scheme.kind == "int":
        assert after.sum() < 0.8 * before.sum()


def test_what_lies_on_the_grid_is_not_touched() -> None:
    weight, inputs = case()
    weight = encode(weight, INT4).dequantize()
    found = search_limits(weight, INT4, moments_of(inputs, 16))
    assert found.clipped_share == 0
    assert torch.equal(clipped(weight, found.limits), weight)


def test_moments_add_up() -> None:
    _, inputs = case()
    whole, parts = moments_of(inputs, 16), sum(moments_of([x], 16) for x in inputs)
    assert torch.allclose(whole, parts, rtol=1e-5, atol=1e-4)
    x = torch.cat([b.reshape(-1, 48) for b in inputs])[:, 16:32]
    assert torch.allclose(whole[1], x.T @ x, rtol=1e-4, atol=1e-3)


def test_clipped_keeps_the_dtype_and_values_within() -> None:
    weight = torch.tensor([[1.5, -2.0, 0.25, 8.0]]).bfloat16()
    got = clipped(weight, torch.tensor([[1.0, 8.0]]))
    assert got.dtype == torch.bfloat16
    assert got.tolist() == [[1.0, -1.0, 0.25, 8.0]]
