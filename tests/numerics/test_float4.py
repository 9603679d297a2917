from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qwench.numerics import SCHEMES, Quantized, Scheme, decode, encode, outer_scale
from qwench.numerics.float4 import E2M1, FOUR_OVER_SIX, MX_SHIFTS, NVFP4_FACTORS, OUTER_RANGE, power_of_two, round_e4m3
from tests.references import rounding

NVFP4, MXFP4 = SCHEMES["nvfp4"], SCHEMES["mxfp4"]


def weights(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gaussian rows of very different sizes, with ties, zeros and negative zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.logspace(-3, 1, rows).unsqueeze(1)
    weight[0, :64] = torch.arange(64) / 4 - 8
    weight[1, :32] = 0
    weight[2, 3] = -0.0
    return weight.to(dtype)


def ties(outer: float) -> Tensor:
    """One block each whose quotients are exactly every tie of E2M1, both signs, and the neighbours of ties."""
    points = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    near = [math.nextafter(p, 10) for p in points]
    beside = [2 * p - n for p, n in zip(points, near, strict=True)]
    row = torch.tensor([6.0, *points, *(-p for p in points), 0.0, -6.0, *near, *beside, 0.0])
    up, down = (np.nextafter(row.numpy(), np.float32(side)) for side in (10, -10))
    return torch.stack([row, torch.from_numpy(np.clip(up, -6, 6)), torch.from_numpy(np.clip(down, -6, 6))]) * (448 / outer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nvfp4_equals_the_literal_version(dtype: torch.dtype) -> None:
    weight = weights(13, 96, dtype=dtype)
    outer = outer_scale(float(weight.abs().max()))
    got = encode(weight, NVFP4, outer)
    codes, scales = rounding.nvfp4(weight.float().numpy(), np.float32(outer.item()))
    assert got.codes.tolist() == codes
    assert got.scales.float().tolist() == scales


def test_nvfp4_ties_go_to_the_even_code() -> None:
    outer = torch.tensor([448.0])
    weight = ties(448.0)
    got = encode(weight, NVFP4, outer)
    codes, scales = rounding.nvfp4(weight.numpy(), np.float32(448))
    assert got.codes.tolist() == codes
    assert got.scales.float().tolist() == scales
    assert (got.scales.float() == 448).all()
    assert got.codes[0, 1:8].tolist() == [0, 2, 2, 4, 4, 6, 6]


@pytest.mark.parametrize("search", ["mse", "four-over-six"])
def test_nvfp4_search_equals_the_literal_version(search: str) -> None:
    weight = weights(9, 112, seed=5)
    outer = outer_scale(float(weight.abs().max()))
    got = encode(weight, dataclasses.replace(NVFP4, search=search), outer)
    factors = NVFP4_FACTORS if search == "mse" else FOUR_OVER_SIX
    codes, scales = rounding.nvfp4(weight.float().numpy(), np.float32(outer.item()), factors)
    assert got.codes.tolist() == codes
    assert got.scales.float().tolist() == scales


@pytest.mark.parametrize("search", ["none", "mse"])
def test_mxfp4_equals_the_literal_version(search: str) -> None:
    weight = weights(11, 160, seed=2)
    got = encode(weight, dataclasses.replace(MXFP4, search=search))
    codes, exponents = rounding.mxfp4(weight.float().numpy(), MX_SHIFTS if search == "mse" else (0,))
    assert got.codes.tolist() == codes
    assert got.scales.tolist() == exponents


@pytest.mark.parametrize("scheme", [NVFP4, MXFP4], ids=lambda s: s.kind)
def test_decoded_is_the_nearest_value_of_the_scale(scheme: Scheme) -> None:
    weight = weights(10, 224, seed=7, dtype=torch.float32)
    got = encode(weight, scheme)
    values = decode(got)
    scale = (got.scales.float() / got.outer if got.outer is not None else power_of_two(got.scales)).repeat_interleave(
        scheme.group, 1
    )
    levels = torch.tensor([s * m for s in (1, -1) for m in E2M1])
    distances = (levels.double() * scale.double().unsqueeze(-1) - weight.double().unsqueeze(-1)).abs().amin(-1)
    error = (values.double() - weight.double()).abs()
    assert (error <= distances + 1e-6 * scale).all()


@pytest.mark.parametrize("scheme", [NVFP4, MXFP4], ids=lambda s: s.kind)
def test_every_code_round_trips(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(11)
    codes = torch.randint(0, 16, (6, 128), generator=generator, dtype=torch.uint8)
    codes[:, :: scheme.group] = torch.tensor([7, 15, 7, 15, 7, 7], dtype=torch.uint8).unsqueeze(
        1
    )  # each block holds its largest value
    if scheme.kind == "nvfp4":
        scales = torch.tensor([0.0156, 0.11, 1, 7.3, 96, 448]).repeat(8, 1).t().contiguous().to(torch.float8_e4m3fn)
        written = Quantized(scheme, codes, scales, outer=torch.tensor([1234.5]))
    else:
        written = Quantized(
            scheme, codes, torch.tensor([[2], [64], [127], [128], [200], [252]], dtype=torch.uint8).repeat(1, 4)
        )
    again = encode(decode(written), scheme, written.outer)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scales.view(torch.uint8), written.scales.view(torch.uint8))
    assert again.error is not None
    assert again.error.max_abs == 0.0


def test_every_fp4_code_decodes_to_its_value() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).reshape(2, 16)
    one = Quantized(NVFP4, codes, torch.ones(2, 1).to(torch.float8_e4m3fn), outer=torch.ones(1))
    assert decode(one).tolist() == [[*E2M1, *(-m for m in E2M1)]] * 2


@pytest.mark.parametrize("scheme", [NVFP4, MXFP4], ids=lambda s: s.kind)
@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1.0, 1e30, 3.3e38])
def test_extreme_weights_stay_finite(scheme: Scheme, search: str, size: float) -> None:
    weight = torch.tensor([1.0, -0.7, 0.3, 0.0] * 32).reshape(2, 64) * torch.tensor(size)
    weight[1, :32] = 0
    got = encode(weight, dataclasses.replace(scheme, search=search))
    values = decode(got)
    assert torch.isfinite(values).all()
    assert torch.isfinite(got.scales.float()).all()
    assert got.error is not None
    assert all(math.isfinite(x) for x in dataclasses.astuple(got.error))
    assert (values[1, :32] == 0).all()
    if 1e-30 <= size <= 1e30:
        assert got.error.relative_rms < 0.25
    assert (values.abs() <= 1.34 * weight.abs().max()).all()


def test_outer_scale_is_stated_at_its_ends() -> None:
    assert outer_scale(0.0).tolist() == [1.0]
    assert outer_scale(torch.tensor(3.5)).tolist() == [448 * 6 / 3.5]
    assert outer_scale(1e-45).item() == OUTER_RANGE[1]
    assert outer_scale(3.4e38).item() == OUTER_RANGE[0]
    assert outer_scale(1.0).dtype == torch.float32
    assert outer_scale(1.0).shape == (1,)


def test_round_e4m3_is_what_torch_converts() -> None:
    values = torch.logspace(-2.2, 2.8, 5000)
    expected = values.clamp(2**-6, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(round_e4m3(values.clone()), expected)


def test_searches_are_never_worse_in_any_block() -> None:
    weight = weights(17, 256, seed=9)
    outer = outer_scale(float(weight.abs().max()))
    for scheme, searches in ((NVFP4, ("mse", "four-over-six")), (MXFP4, ("mse",))):
        plain = block_errors(weight, encode(weight, scheme, outer), scheme.group or 1)
        for search in searches:
            found = block_errors(weight, encode(weight, dataclasses.replace(scheme, search=search), outer), scheme.group or 1)
            assert (found <= plain * (1 + 1e-5)).all(), search
            assert found.sum() < (0.95 if scheme == NVFP4 else 1.0) * plain.sum(), search


def block_errors(weight: Tensor, got: Quantized, group: int) -> Tensor:
    return (decode(got).double() - weight.double()).square().view(weight.shape[0], -1, group).sum(-1)


def test_error_is_that_of_the_decoded_values() -> None:
    weight = weights(19, 320, seed=4)
    for scheme in (NVFP4, MXFP4):
        got = encode(weight, scheme)
        error = (decode(got).double() - weight.double()).abs()
        assert got.error is not None
        assert got.error.mean_abs == pytest.approx(float(error.mean()), rel=1e-5)
        assert got.error.max_abs == pytest.approx(float(error.max()), rel=1e-6)
        assert got.error.relative_rms == pytest.approx(float(error.norm() / weight.double().norm()), rel=1e-5)


def test_part_of_a_fused_tensor_is_read_without_a_copy() -> None:
    fused = weights(24, 96, seed=6).reshape(2, 12, 96)
    part = fused[1, 3:9]
    columns = weights(24, 128, seed=8)[:, 32:80]
    for view in (part, columns):
        assert torch.equal(encode(view, NVFP4).codes, encode(view.contiguous(), NVFP4).codes)
