"""Rounding of activations: number by number what the compressed-tensors library does to float32 inputs, and its corners."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from qwench.numerics import InputRounding, outer_scale
from qwench.numerics.activation import round_fp8, round_nvfp4


def activations(seed: int = 3) -> Tensor:
    """[2, 37, 96]: blocks over 30 binary orders, one token of zeros, one block of zeros, outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 37, 96, generator=generator) * torch.exp2(
        torch.randint(-24, 6, (2, 37, 6), generator=generator)
    ).repeat_interleave(16, 2)
    x[0, 3] = 0
    x[1, 5, 16:32] = 0
    x[1, 7, 40] = 900.0
    return x


def library(x: Tensor, preset: str, outer: Tensor | None) -> Tensor:
    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    arguments = scheme.input_activations
    assert arguments is not None
    scale, zero = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Linear(96, 4), global_scale=outer)
    found: Tensor = fake_quantize(x, scale, zero, arguments, global_scale=outer)
    return found


@pytest.mark.parametrize("amax", [3.0, 57.3, 900.0, 40_000.0])
def test_nvfp4_is_what_the_library_computes(amax: float) -> None:
    x, outer = activations(), outer_scale(amax)
    assert torch.equal(round_nvfp4(x, float(outer)), library(x, "NVFP4", outer))


def test_fp8_is_what_the_library_computes() -> None:
    x = activations()
    assert torch.equal(round_fp8(x), library(x, "FP8_DYNAMIC", None))


def test_ties_go_to_the_even_code_on_both_sides_of_zero() -> None:
    ties = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.0])
    got = round_nvfp4(ties[None], 1.0)[0]  # the scale of the block is 1
    assert got.tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, 0.0]


def test_what_is_above_the_window_is_cut_off_and_what_is_far_below_is_zero() -> None:
    outer = float(outer_scale(24.0))
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 16], x[0, 32] = 1000.0, 24.0, 24.0 / 2**19
    assert round_nvfp4(x, outer)[0, ::16].tolist() == [24.0, 24.0, 0.0]


def test_infinity_is_cut_off_and_nan_spoils_its_block_alone() -> None:
    x = torch.ones(2, 32)
    x[0, 2], x[1, 20] = float("-inf"), float("nan")
    got = round_nvfp4(x, float(outer_scale(12.0)))
    assert got[0, 2] == -12.0 and got[0].isfinite().all()
    assert got[1, 16:].isnan().all() and (got[1, :16] - 1).abs().max() < 0.07, "a scale of E4M3 is 6% off at most"


def test_dtype_layout_and_threads_do_not_matter() -> None:
    outer, wide = float(outer_scale(50.0)), activations().bfloat16()
    short = round_nvfp4(wide, outer)
    assert short.dtype == torch.bfloat16 and torch.equal(short, round_nvfp4(wide.float(), outer).bfloat16())
    assert torch.equal(round_nvfp4(wide.transpose(0, 1), outer), short.transpose(0, 1))
    assert torch.equal(round_fp8(wide), round_fp8(wide.float()).bfloat16())
    threads, many = torch.get_num_threads(), torch.randn(3000, 96, generator=torch.Generator().manual_seed(1))
    alone = round_nvfp4(many, outer)
    try:
        torch.set_num_threads(3)
        assert torch.equal(round_nvfp4(many, outer), alone)
    finally:
        torch.set_num_threads(threads)


def test_one_scale_for_all_tokens_and_the_rounding_as_a_value() -> None:
    x = activations()
    stored = (x / 2.0).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 2.0
    assert torch.equal(InputRounding("fp8", 2.0)(x), stored)
    assert torch.equal(InputRounding("fp8")(x), round_fp8(x)) and not torch.equal(round_fp8(x), stored)
    assert torch.equal(InputRounding("nvfp4", 7.0)(x), round_nvfp4(x, 7.0))
    assert InputRounding("nvfp4", 7.0) == InputRounding("nvfp4", 7.0) != InputRounding("nvfp4", 8.0)


def test_no_tokens_are_no_tokens() -> None:
    assert round_nvfp4(torch.empty(0, 32), 1.0).shape == (0, 32) and round_fp8(torch.empty(0, 7)).shape == (0, 7)
