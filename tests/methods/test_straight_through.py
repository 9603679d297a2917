from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from qwench.methods.straight_through import Tuning, nearest_values, round_tuned, tunable_complaint, untuned
from qwench.numerics import SCHEMES, Quantized, Scheme, decode, encode, outer_scale

INTEGERS = [
    Scheme("int", bits, group=group, symmetric=symmetric, full_range=full_range)
    for bits in (4, 8)
    for group in (32, None)
    for symmetric, full_range in ((True, False), (True, True), (False, False))
]
NVFP4 = SCHEMES["nvfp4"]


def weights(rows: int = 10, columns: int = 96, seed: int = 0) -> Tensor:
    """Rows of very different sizes, some of one sign, a group of zeros, ties."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-3, 1, rows).unsqueeze(1)
    weight[0, :32] = 0
    weight[1].abs_()
    weight[2] = -weight[2].abs()
    weight[3, :32] = torch.arange(32) / 2 - 8
    weight[4, :32] = torch.linspace(-4.5, 4.5, 32)  # both ends are as large
    return weight


def same(got: Quantized, want: Quantized) -> None:
    assert torch.equal(got.codes, want.codes)
    assert got.scales.dtype == want.scales.dtype
    assert torch.equal(got.scales.float(), want.scales.float())
    assert (got.zeros is None) == (want.zeros is None)
    assert got.zeros is None or torch.equal(got.zeros, want.zeros)
    assert got.outer is None or torch.equal(got.outer, want.outer)
    assert torch.equal(decode(got), decode(want))


@pytest.mark.parametrize("scheme", INTEGERS, ids=str)
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, torch.float32)]
)
def test_untuned_integers_are_those_of_encode(scheme: Scheme, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    weight, scale_dtype = weights().to(dtypes[0]), dtypes[1]
    got = round_tuned(weight, scheme, untuned(weight, scheme), scale_dtype=scale_dtype)
    want = encode(weight, scheme, scale_dtype=scale_dtype)
    same(got.quantized(weight, scheme, scale_dtype), want)
    assert torch.equal(got.values(), decode(want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shared", [False, True])
def test_untuned_nvfp4_is_that_of_encode(dtype: torch.dtype, shared: bool) -> None:
    weight = weights(seed=1).to(dtype)
    weight[4, :16] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2) * torch.tensor([1, -1] * 8)
    outer = outer_scale(40.0) if shared else None
    got = round_tuned(weight, NVFP4, untuned(weight, NVFP4), outer)
    want = encode(weight, NVFP4, outer)
    same(got.quantized(weight, NVFP4, torch.bfloat16), want)
    assert torch.equal(got.values(), decode(want))


def test_nearest_values_takes_every_scheme() -> None:
    weight = weights(columns=128)
    for name, scheme in SCHEMES.items():
        assert torch.equal(nearest_values(weight, scheme), decode(encode(weight, scheme))), name


@pytest.mark.parametrize("scheme", [*INTEGERS, NVFP4], ids=str)
def test_tuned_codes_decode_to_what_was_seen(scheme: Scheme) -> None:
    weight = weights(seed=2)
    tuning, generator = untuned(weight, scheme), torch.Generator().manual_seed(3)
    tuning.offset.uniform_(-0.5, 0.5, generator=generator)
    tuning.low.uniform_(0.3, 1.0, generator=generator)
    tuning.high.uniform_(0.3, 1.0, generator=generator)
    got = round_tuned(weight, scheme, tuning)
    assert torch.equal(decode(got.quantized(weight, scheme, torch.bfloat16)), got.values())
    assert not torch.equal(got.values(), decode(encode(weight, scheme)))


def test_an_offset_moves_a_code_by_one_step_at_most() -> None:
    weight = weights(seed=4)
    for scheme in (SCHEMES["int4"], SCHEMES["int8-asym"], NVFP4):
        scheme = dataclasses.replace(scheme, group=16)
        start = untuned(weight, scheme)
        nearest = round_tuned(weight, scheme, start)
        for sign in (-0.5, 0.5):
            moved = round_tuned(weight, scheme, Tuning(start.offset + sign, start.low, start.high))
            grid = sorted(set(nearest.codes.flatten().tolist()) | set(moved.codes.flatten().tolist()))
            place = {code: i for i, code in enumerate(grid)}
            steps = [
                place[b] - place[a]
                for a, b in zip(nearest.codes.flatten().tolist(), moved.codes.flatten().tolist(), strict=True)
            ]
            assert set(steps) == {0, int(sign * 2)}
            assert torch.equal(moved.scales, nearest.scales)


def test_gradients_pass_straight_through() -> None:
    weight = torch.tensor([[8.0, 3.3, -1.6, 0.2]])
    scheme = Scheme("int", 4, group=4, full_range=True)
    start = untuned(weight, scheme)
    offset, high = start.offset.requires_grad_(), start.high.requires_grad_()
    upstream = torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    round_tuned(weight, scheme, Tuning(offset, start.low, high)).values().backward(upstream)
    assert offset.grad is not None
    assert high.grad is not None
    # scale = -high * 8 / 8 = -1; value = round(w / scale + V) * scale: d value / dV = scale.
    assert torch.equal(offset.grad, -upstream)
    # d value / d scale = code - w / scale, and d scale / d high = -1; the codes are -8, -3, 2 and 0.
    expected = sum(-g * (code + w) for g, code, w in zip([1, 2, 3, 5], [-8, -3, 2, 0], [8, 3.3, -1.6, 0.2], strict=True))
    assert float(high.grad) == pytest.approx(expected, rel=1e-5)


def test_what_has_no_trainable_rounding_says_so() -> None:
    assert tunable_complaint(SCHEMES["int4"]) is None
    assert "mxfp4 g32 has no trainable rounding" in str(tunable_complaint(SCHEMES["mxfp4"]))
    assert "fp8 channel" in str(tunable_complaint(SCHEMES["fp8"]))
    assert "come from GPTQ" in str(tunable_complaint(dataclasses.replace(SCHEMES["int4"], ordered=True)))
    assert "(mse)" in str(tunable_complaint(dataclasses.replace(SCHEMES["int4"], search="mse")))
