"""Our bytes against the compressed-tensors library: it must read them to exactly our values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from qwench import numerics
from qwench.checkpoint.source import TORCH_DTYPE
from qwench.errors import CheckpointError
from qwench.formats.compressed_tensors import FORMAT_OF, complaint, layout, pack, quantization_config, scheme_of, unpack
from qwench.formats.quantization_config import activation_arguments, weight_arguments
from qwench.numerics import SCHEMES, Quantized, Scheme, decode
from qwench.numerics.float4 import power_of_two

MODULE = "model.layers.3.mlp.up_proj"
SEVERAL = {
    **SCHEMES,
    "int4 g32": Scheme("int", 4, group=32, full_range=True),
    "int4 channel": Scheme("int", 4),
    "int4 channel asym": Scheme("int", 4, symmetric=False),
    "int8 channel": Scheme("int", 8),
    "nvfp4 46": dataclasses.replace(SCHEMES["nvfp4"], search="four-over-six"),
}
SHAPES = [(24, 256), (19, 384), (300, 128)]
ODD_SHAPES = {
    "int4 channel": [(7, 37), (5, 8)],
    "int4 channel asym": [(7, 37), (13, 30)],
    "int8 channel": [(3, 31)],
    "fp8": [(9, 41)],
    "fp8-block": [(130, 200), (40, 129), (257, 384)],
    "int4 g32": [(3, 96)],
    "nvfp4": [(3, 48)],
    "mxfp4": [(5, 96)],
}
CASES = [(name, shape) for name in SEVERAL for shape in [*SHAPES, *ODD_SHAPES.get(name, [])]]


def weight_of(shape: tuple[int, int]) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    weight[0, :16] = 0
    weight[1] *= 30
    return weight.bfloat16()


def library_scheme(scheme: Scheme) -> QuantizationScheme:
    return QuantizationScheme(
        targets=["Linear"],
        weights=weight_arguments(scheme),
        input_activations=activation_arguments(scheme),
        format=FORMAT_OF[scheme.kind],
    )


def encode(weight: Tensor, scheme: Scheme, outer: Tensor | None = None, scale_dtype: torch.dtype = torch.bfloat16) -> Quantized:
    """A weight as a method hands it over, with the range of its inputs where the scheme has one."""
    quantized = numerics.encode(weight, scheme, outer, scale_dtype)
    return dataclasses.replace(quantized, input_outer=torch.tensor([37.25]) if scheme.activations == "nvfp4" else None)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_layout_promises_what_pack_returns(name: str, shape: tuple[int, int]) -> None:
    for dtype in ("BF16", "F32"):
        tensors = pack(MODULE, encode(weight_of(shape), SEVERAL[name], scale_dtype=TORCH_DTYPE[dtype]))
        promised = {s.name: (TORCH_DTYPE[s.dtype], s.shape) for s in layout(MODULE, shape, SEVERAL[name], dtype)}
        assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == promised
        assert all(t.is_contiguous() for t in tensors.values())


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_unpack_is_the_inverse_of_pack(name: str, shape: tuple[int, int]) -> None:
    written = encode(weight_of(shape), SEVERAL[name])
    read = unpack(MODULE, pack(MODULE, written), SEVERAL[name], shape)
    for field in ("codes", "scales", "zeros", "outer", "input_outer"):
        ours, theirs = getattr(written, field), getattr(read, field)
        assert (ours is None) == (theirs is None), field
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))), (
            field
        )


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_library_reads_our_tensors_to_our_values(name: str, shape: tuple[int, int]) -> None:
    """As the library loads a file: it computes in the dtype of the scales (for FP4: bfloat16), which our exact values are rounded to."""
    scheme = library_scheme(SEVERAL[name])
    written = encode(weight_of(shape), SEVERAL[name])
    state = {n.rpartition(".")[2]: t for n, t in pack(MODULE, written).items()}
    read = BaseCompressor.get_value_from_registry(FORMAT_OF[SEVERAL[name].kind]).decompress(state, scheme)["weight"]
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, decode(written).bfloat16())


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_library_arithmetic_in_float32_gives_exactly_our_values(name: str, shape: tuple[int, int]) -> None:
    """The same bytes through the library's own formula, without its rounding to bfloat16."""
    ours, written = SEVERAL[name], encode(weight_of(shape), SEVERAL[name])
    scheme = library_scheme(ours)
    state = {n.rpartition(".")[2]: t for n, t in pack(MODULE, written).items()}
    if ours.kind in ("nvfp4", "mxfp4"):
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

        codes = unpack_fp4_from_uint8(state["weight_packed"], *shape, dtype=torch.float32)
        scale = state["weight_scale"].float() if ours.kind == "nvfp4" else power_of_two(state["weight_scale"])
        read = dequantize(codes, scale, args=scheme.weights, dtype=torch.float32, global_scale=state.get("weight_global_scale"))
    else:
        state["weight_scale"] = state["weight_scale"].float()
        read = BaseCompressor.get_value_from_registry(FORMAT_OF[ours.kind]).decompress(state, scheme)["weight"]
    assert read.dtype == torch.float32
    assert torch.equal(read, decode(written))


@pytest.mark.parametrize("name", ["int4 g32", "int4-asym", "int8", "nvfp4", "mxfp4", "fp8", "fp8-block"])
def test_library_rounds_to_our_codes_given_our_scales(name: str) -> None:
    """Ties and clamping are the library's. Weights are put on and beside ties of the format."""
    ours = SEVERAL[name]
    weight = decode(encode(weight_of((136, 256)), ours)) * torch.linspace(0.9, 1.1, 136).unsqueeze(1)
    weight[:, 1::2] = weight[:, 1::2].bfloat16().float()
    weight += 0.0  # of a negative zero we keep the sign in FP4, the library does not
    written = encode(weight, ours, scale_dtype=torch.float32)
    scale = {"mxfp4": lambda: power_of_two(written.scales), "nvfp4": lambda: written.scales.float()}.get(
        ours.kind, lambda: written.scales
    )()
    state = {"weight": weight, "weight_scale": scale}
    if written.outer is not None:
        state["weight_global_scale"] = written.outer
    if written.zeros is not None:
        state["weight_zero_point"] = written.zeros
    packed = BaseCompressor.get_value_from_registry(FORMAT_OF[ours.kind]).compress(state, library_scheme(ours))
    name_of_codes = "weight" if ours.kind == "fp8" else "weight_packed"
    assert torch.equal(
        packed[name_of_codes].view(torch.uint8), pack(MODULE, written)[f"{MODULE}.{name_of_codes}"].view(torch.uint8)
    )


def test_library_chooses_our_nvfp4_and_mxfp4_scales() -> None:
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    for name, group in (("nvfp4", 16), ("mxfp4", 32)):
        arguments = library_scheme(SCHEMES[name]).weights
        blocks = weight.view(40, -1, group)
        outer = generate_gparam(weight.amin(), weight.amax()) if name == "nvfp4" else None
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments, outer)
        written = encode(weight, SCHEMES[name], outer)
        # The library holds MXFP4 scales as 2^e here, and E8M0 exponents in the file.
        ours = written.scales.float() if name == "nvfp4" else power_of_two(written.scales)
        assert torch.equal(ours, scale.float())


@pytest.mark.parametrize("name", SCHEMES)
def test_config_groups_pass_the_library(name: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    config = quantization_config({MODULE: SCHEMES[name]}, ["lm_head"])
    read = QuantizationConfig.model_validate(config)
    assert read.format == FORMAT_OF[SCHEMES[name].kind]
    assert read.config_groups["group_0"] == library_scheme(SCHEMES[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{MODULE}.weight_scale"), "weight_scale is missing"),
        (lambda t: t.update({f"{MODULE}.weight_packed": t[f"{MODULE}.weight_packed"][:, 1:]}), "has the shape [24, 127]"),
        (lambda t: t.update({f"{MODULE}.weight_global_scale": torch.ones(1).double()}), "is torch.float64"),
        (lambda t: t.update({f"{MODULE}.weight_scale": t[f"{MODULE}.weight_scale"].bfloat16()}), "is torch.bfloat16"),
    ],
)
def test_wrong_tensors_are_named(change: object, words: str) -> None:
    tensors = pack(MODULE, encode(weight_of((24, 256)), SCHEMES["nvfp4"]))
    change(tensors)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=words.replace("[", r"\[").replace("]", r"\]")) as error:
        unpack(MODULE, tensors, SCHEMES["nvfp4"], (24, 256))
    assert MODULE in error.value.what
    assert error.value.mend


@pytest.mark.parametrize("name", ["int4 g32", "int8", "int4-asym"])
def test_ordered_columns_are_written_and_read(name: str) -> None:
    """As the library had it until 2026 (`actorder: group`): the scales stand where the groups are, `weight_g_idx` says whose they are."""
    shape = (19, 384)
    scheme = dataclasses.replace(SEVERAL[name], ordered=True)
    rounded = encode(weight_of(shape), SEVERAL[name])
    order = torch.randperm(384, generator=torch.Generator().manual_seed(2)).to(torch.int32) // (scheme.group or 384)
    written = dataclasses.replace(rounded, scheme=scheme, group_of_column=order)
    tensors = pack(MODULE, written)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        s.name: (TORCH_DTYPE[s.dtype], s.shape) for s in layout(MODULE, shape, scheme)
    }
    read = unpack(MODULE, tensors, scheme, shape)
    assert read.group_of_column is not None and torch.equal(read.group_of_column, order)
    scales = rounded.scales.float()[:, order.long()]
    zeros = 0 if rounded.zeros is None else rounded.zeros.float()[:, order.long()]
    assert torch.equal(decode(read), (rounded.codes.float() - zeros) * scales)
    assert scheme_of(
        {"config_groups": {"g": {"targets": ["Linear"], "format": "pack-quantized", "weights": weight_arguments(scheme)}}},
        MODULE,
    ) == (dataclasses.replace(scheme, full_range=False))
    del tensors[f"{MODULE}.weight_g_idx"]
    with pytest.raises(CheckpointError, match="weight_g_idx is missing"):
        unpack(MODULE, tensors, scheme, shape)


def test_ordered_columns_are_not_offered() -> None:
    """The library that our bytes are checked against refuses them, and with it transformers; vLLM 0.32 does too."""
    ordered = dataclasses.replace(SEVERAL["int4 g32"], ordered=True)
    assert "lost the order" in str(complaint(ordered, (8, 96)))
    with pytest.raises(ValueError, match="has been removed"):
        library_scheme(ordered)
    assert all(complaint(scheme, (8, 384)) is None for scheme in SEVERAL.values())


def test_a_quantized_weight_that_was_read_has_no_error() -> None:
    read = unpack(MODULE, pack(MODULE, encode(weight_of((24, 256)), SCHEMES["int4"])), SCHEMES["int4"], (24, 256))
    assert isinstance(read, Quantized)
    assert read.error is None
