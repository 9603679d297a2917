from __future__ import annotations

import pytest
import torch

from qwench.methods.rtn import round_fused, round_to_nearest, shared_outer
from qwench.numerics import SCHEMES, decode, encode, outer_scale

WEIGHTS = [
    torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).bfloat16() * size
    for rows, size in ((24, 1), (8, 3), (11, 0.1))
]


def test_a_fused_set_shares_the_outer_scale_of_its_largest_weight() -> None:
    rounded = round_fused(WEIGHTS, SCHEMES["nvfp4"])
    expected = outer_scale(max(float(w.abs().max()) for w in WEIGHTS))
    for weight, quantized in zip(WEIGHTS, rounded, strict=True):
        assert quantized.outer is not None
        assert torch.equal(quantized.outer, expected)
        assert torch.equal(quantized.codes, encode(weight, SCHEMES["nvfp4"], expected).codes)
    assert not torch.equal(expected, outer_scale(float(WEIGHTS[0].abs().max())))


@pytest.mark.parametrize("name", [n for n in SCHEMES if SCHEMES[n].kind != "nvfp4"])
def test_other_schemes_share_nothing(name: str) -> None:
    assert shared_outer(WEIGHTS, SCHEMES[name]) is None
    for weight, quantized in zip(WEIGHTS, round_fused(WEIGHTS, SCHEMES[name]), strict=True):
        assert torch.equal(decode(quantized), decode(round_to_nearest(weight, SCHEMES[name])))


def test_scales_have_the_dtype_that_is_asked_for() -> None:
    assert round_to_nearest(WEIGHTS[0], SCHEMES["int4"], scale_dtype=torch.float32).scales.dtype == torch.float32
    assert round_fused(WEIGHTS, SCHEMES["fp8"], torch.float16)[1].scales.dtype == torch.float16
