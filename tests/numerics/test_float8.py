from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qwench.numerics import SCHEMES, Quantized, Scheme, decode, encode
from tests.references import rounding

CHANNEL, BLOCK = SCHEMES["fp8"], SCHEMES["fp8-block"]


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-4, 1, rows).unsqueeze(1)
    weight[0] = 0
    return weight


def store(dtype: torch.dtype) -> rounding.Callable:
    def rounded(scale: np.float32) -> np.float32:
        return np.float32(torch.tensor(max(float(scale), torch.finfo(dtype).tiny)).to(dtype).item())

    return rounded


@pytest.mark.parametrize(("scheme", "shape"), [(CHANNEL, (7, 90)), (BLOCK, (140, 130)), (BLOCK, (12, 257)), (BLOCK, (129, 40))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_literal_version(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weights(*shape).bfloat16()
    got = encode(weight, scheme, scale_dtype=dtype)
    values, scales = rounding.fp8(weight.float().numpy(), scheme.block or (1, shape[1]), store(dtype))
    assert got.scales.dtype == dtype
    assert got.scales.float().tolist() == scales.tolist()
    assert got.codes.float().tolist() == values.tolist()


def test_every_code_round_trips() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes % 128 == 127] = 126  # the two NaN become 448
    codes = codes.repeat(3, 1).view(torch.float8_e4m3fn)
    written = Quantized(CHANNEL, codes, torch.tensor([[0.5], [3.0], [2.0**-70]]).bfloat16())
    again = encode(decode(written), CHANNEL)
    assert torch.equal(again.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(again.scales, written.scales)


@pytest.mark.parametrize("scheme", [CHANNEL, BLOCK], ids=["channel", "block"])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1.0, 1e30, 3.38e38])
def test_extreme_weights_stay_finite(scheme: Scheme, size: float) -> None:
    weight = torch.tensor([1.0, -0.7, 0.3, 0.0] * 50).reshape(2, 100) * torch.tensor(size)
    got = encode(weight, scheme)
    assert torch.isfinite(decode(got)).all()
    assert (got.scales > 0).all()
    assert got.error is not None
    assert all(math.isfinite(x) for x in dataclasses.astuple(got.error))
    if 1e-30 <= size <= 1e30:
        assert got.error.relative_rms < 0.05


@pytest.mark.parametrize("scheme", [CHANNEL, BLOCK], ids=["channel", "block"])
def test_error_is_that_of_the_decoded_values(scheme: Scheme) -> None:
    weight = weights(260, 1100, seed=4).bfloat16()
    got = encode(weight, scheme)
    error = (decode(got).double() - weight.double()).abs()
    assert got.error is not None
    assert got.error.mean_abs == pytest.approx(float(error.mean()), rel=1e-5)
    assert got.error.max_abs == pytest.approx(float(error.max()), rel=1e-6)
    assert got.error.relative_rms == pytest.approx(float(error.norm() / weight.double().norm()), rel=1e-5)


def test_block_scales_serve_their_blocks() -> None:
    weight = torch.ones(300, 270)
    weight[128:256, 256:] = 100
    got = encode(weight, BLOCK)
    assert got.scales.shape == (3, 3)
    assert (got.scales.float() * 448).round().tolist() == [[1, 1, 1], [1, 1, 100], [1, 1, 1]]
