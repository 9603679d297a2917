from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qwench.numerics import SCHEMES, Quantized, Scheme, decode, encode
from tests.references import rounding

KINDS = {
    "symmetric": Scheme("int", 4, group=32),
    "full_range": Scheme("int", 4, group=32, full_range=True),
    "asymmetric": Scheme("int", 4, group=32, symmetric=False),
}


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Gaussian rows of very different sizes; some groups of one sign only, one of zeros."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-3, 1, rows).unsqueeze(1)
    weight[0, :32] = 0
    weight[1].abs_()
    weight[2] = -weight[2].abs()
    weight[3, :32] = torch.arange(32) / 2 - 8
    return weight


def store(dtype: torch.dtype, largest_code: int) -> rounding.Callable:
    info = torch.finfo(dtype)

    def rounded(scale: np.float32) -> np.float32:
        size = min(max(abs(float(scale)), info.tiny), min(info.max, torch.finfo(torch.bfloat16).max) / largest_code)
        return np.float32(torch.tensor(math.copysign(size, scale) if scale < 0 else size).to(dtype).item())

    return rounded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)]
)
def test_equals_the_literal_version(kind: str, bits: int, group: int | None, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    scheme = dataclasses.replace(KINDS[kind], bits=bits, group=group)
    weight = weights(10, 96).to(dtypes[0])
    got = encode(weight, scheme, scale_dtype=dtypes[1])
    largest = 2**bits if kind == "asymmetric" else 2 ** (bits - 1)
    codes, scales, zeros = rounding.integer(weight.float().numpy(), bits, group or 96, kind, store(dtypes[1], largest))
    assert got.scales.dtype == dtypes[1]
    assert got.scales.float().tolist() == scales
    assert got.codes.tolist() == codes
    assert (got.zeros.tolist() if got.zeros is not None else [[0] * len(row) for row in zeros]) == zeros


def test_ties_go_to_the_even_code() -> None:
    weight = torch.tensor([[7.0, -8.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]) * -0.25
    got = encode(weight, Scheme("int", 4, group=8, full_range=True))
    assert got.scales.tolist() == [[-0.25]]
    assert got.codes.tolist() == [[7, -8, 0, 2, 2, 0, -2, -2]]


def test_full_range_puts_the_extreme_on_the_lowest_code() -> None:
    weight = weights(12, 64, seed=1)
    got = encode(weight, KINDS["full_range"])
    extreme = weight.view(12, 2, 32).abs().argmax(-1, keepdim=True)
    assert (got.codes.view(12, 2, 32).gather(-1, extreme)[weight.view(12, 2, 32).gather(-1, extreme) != 0] == -8).all()
    assert (got.scales < 0).any()
    assert (got.scales > 0).any()


def test_full_range_rounds_better_than_the_usual_scale() -> None:
    weight = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    errors = {k: encode(weight, dataclasses.replace(s, group=128)).error for k, s in KINDS.items()}
    usual, full = errors["symmetric"], errors["full_range"]
    assert usual is not None
    assert full is not None
    assert full.relative_rms < 0.97 * usual.relative_rms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_decoded_is_the_nearest_value_of_the_scale(kind: str, bits: int) -> None:
    weight = weights(9, 128, seed=2)
    scheme = dataclasses.replace(KINDS[kind], bits=bits)
    got = encode(weight, scheme)
    scale = got.scales.double().repeat_interleave(32, 1)
    zero = got.zeros.double().repeat_interleave(32, 1) if got.zeros is not None else torch.zeros_like(scale)
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).double()
    distances = ((levels - zero.unsqueeze(-1)) * scale.unsqueeze(-1) - weight.double().unsqueeze(-1)).abs().amin(-1)
    error = (decode(got).double() - weight.double()).abs()
    assert (error <= distances + 1e-6 * scale.abs()).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["full_range", "asymmetric"])
def test_every_code_round_trips(kind: str, bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scheme = dataclasses.replace(KINDS[kind], bits=bits, group=256)
    codes = torch.arange(256).remainder(2**bits).add(low).to(torch.int8).repeat(3, 1)
    scales = torch.tensor([[0.25], [-3.0], [2.0**-90]]).bfloat16()
    zeros = None if scheme.symmetric else torch.tensor([[0], [low], [high]], dtype=torch.int8)
    if zeros is not None:
        scales = scales.abs()
    written = Quantized(scheme, codes, scales, zeros)
    again = encode(decode(written), scheme)
    assert torch.equal(again.scales, scales)
    assert torch.equal(again.codes, codes)
    assert zeros is None or (again.zeros is not None and torch.equal(again.zeros, zeros))


@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1.0, 1e30, 3.38e38])
def test_extreme_weights_stay_finite(kind: str, search: str, size: float) -> None:
    weight = torch.tensor([1.0, -0.7, 0.3, 0.0] * 32).reshape(2, 64) * torch.tensor(size)
    weight[1, :32] = 0
    got = encode(weight, dataclasses.replace(KINDS[kind], search=search))
    values = decode(got)
    assert torch.isfinite(values).all()
    assert torch.isfinite(got.scales).all()
    assert (got.scales != 0).all()
    assert got.error is not None
    assert all(math.isfinite(x) for x in dataclasses.astuple(got.error))
    assert (values[1, :32] == 0).all()
    if 1e-30 <= size <= 1e30:
        assert got.error.relative_rms < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_never_worse_in_any_group(kind: str, bits: int) -> None:
    weight = weights(14, 256, seed=3)
    weight[5, ::32] *= 6  # outliers, which a shrunken range clamps
    scheme = dataclasses.replace(KINDS[kind], bits=bits)
    plain, found = encode(weight, scheme), encode(weight, dataclasses.replace(scheme, search="mse"))
    squares = [(decode(q).double() - weight.double()).square().view(14, -1, 32).sum(-1) for q in (plain, found)]
    assert (squares[1] <= squares[0] * (1 + 1e-5)).all()
    if bits == 4:
        assert squares[1].sum() < 0.97 * squares[0].sum()


@pytest.mark.parametrize("name", ["int4", "int4-asym", "int8", "int8-asym"])
def test_error_is_that_of_the_decoded_values(name: str) -> None:
    weight = weights(15, 384, seed=4).bfloat16()
    got = encode(weight, SCHEMES[name])
    error = (decode(got).double() - weight.double()).abs()
    assert got.error is not None
    assert got.error.mean_abs == pytest.approx(float(error.mean()), rel=1e-5)
    assert got.error.max_abs == pytest.approx(float(error.max()), rel=1e-6)
    assert got.error.relative_rms == pytest.approx(float(error.norm() / weight.double().norm()), rel=1e-5)


def test_permuted_groups_decode_column_by_column() -> None:
    plain = encode(weights(11, 96, seed=5), KINDS["asymmetric"])
    order = torch.randperm(96, generator=torch.Generator().manual_seed(6))
    permuted = dataclasses.replace(plain, codes=plain.codes[:, order], group_of_column=(order // 32).to(torch.int32))
    assert torch.equal(decode(permuted), decode(plain)[:, order])
