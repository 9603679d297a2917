"""Eight-bit releases of others: the bytes that the compressed-tensors library writes, read back to the values that it reads, and inputs rounded as it rounds them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwench.checkpoint.source import TORCH_DTYPE
from qwench.errors import CheckpointError
from qwench.formats.compressed_tensors import layout, pack, unpack
from qwench.formats.quantization_config import scheme_of
from qwench.formats.release import Release, open_source
from qwench.numerics import Quantized, complaint

MODULE = "model.language_model.layers.3.mlp.up_proj"
NAME = f"{MODULE}.weight"
CHANNEL_STATIC = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
INTEGER_TENSOR = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}


def made(preset: str, **weights: Any) -> QuantizationScheme:
    found = preset_name_to_scheme(preset, ["Linear"])
    return found.model_copy(update={"weights": QuantizationArgs(**weights)}) if weights else found


SCHEMES: dict[str, QuantizationScheme] = {
    "fp8 dynamic": made("FP8_DYNAMIC"),
    "fp8 static": made("FP8"),
    "fp8 by row, static inputs": made("FP8", **CHANNEL_STATIC),
    "fp8 blocks": made("FP8_BLOCK"),
    "fp8 weight only, one scale": QuantizationScheme(targets=["Linear"], weights=made("FP8").weights),
    "int8": made("W8A8"),
    "int8, one scale": made("W8A8", **INTEGER_TENSOR),
}
SHAPE = {"fp8 blocks": (200, 328)}
"""Partial blocks at both edges."""


@dataclass
class Written:
    """A weight as the library stores it, its own reading of that, and the module that it came from."""

    folder: Path
    values: Tensor
    linear: torch.nn.Linear


def write(folder: Path, case: str, scale_dtype: torch.dtype, loose: bool = False) -> Written:
    """`loose`: scales of one number without a dimension, as older writers have them."""
    scheme, shape = SCHEMES[case], SHAPE.get(case, (56, 88))
    weights, inputs = scheme.weights, scheme.input_activations
    assert weights is not None
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * torch.linspace(0.1, 4, shape[0])[:, None]
    state = {"weight": weight, "weight_scale": _scales(weight, weights).to(scale_dtype)}
    form = "float-quantized" if inputs is None else infer_module_format(torch.nn.Linear, scheme).value
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    tensors = {f"{MODULE}.{last}": tensor for last, tensor in stored.items()}
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    if inputs is not None and not inputs.dynamic:
        linear.input_scale = torch.nn.Parameter(torch.tensor([0.0123]).to(scale_dtype), requires_grad=False)
        tensors[f"{MODULE}.input_scale"] = linear.input_scale.data
    if loose:
        tensors = {name: tensor.reshape(()) if tensor.shape == (1,) else tensor for name, tensor in tensors.items()}
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    group = scheme.model_dump(mode="json") | {"format": form}
    said = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    linear.quantization_status, linear.quantization_scheme = QuantizationStatus.FROZEN, scheme
    return Written(folder, compressor.decompress(stored, scheme)["weight"], linear)


def _scales(weight: Tensor, arguments: QuantizationArgs) -> Tensor:
    """Of each row, of the whole, or of blocks, of which the last may be partial."""
    if arguments.strategy == "block":
        assert arguments.block_structure is not None
        down, across = arguments.block_structure
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % across, 0, -weight.shape[0] % down))
        blocks = padded.unflatten(0, (-1, down)).unflatten(2, (-1, across))
        return calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), arguments)[0]
    low, high = (
        (weight.amin(1, True), weight.amax(1, True)) if arguments.strategy == "channel" else (weight.amin(), weight.amax())
    )
    return calculate_qparams(low, high, arguments)[0]


def opened(folder: Path) -> Release:
    source = open_source(folder)
    assert isinstance(source, Release)
    return source


@pytest.mark.parametrize("case", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_what_the_library_reads(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    written = write(tmp_path / "r", case, dtype)
    with opened(written.folder) as source:
        ours = source.read(NAME)
        assert list(source.tensors) == [NAME] and source.tensors[NAME].shape == tuple(ours.shape)
        assert torch.equal(ours.to(dtype), written.values) and written.values.dtype == dtype
        assert torch.equal(source.read(NAME, (slice(3, 51), slice(1, None, 2))), ours[3:51, 1::2])
        assert torch.equal(source.read(NAME, (-2,)), ours[-2])


@pytest.mark.parametrize("case", [case for case, scheme in SCHEMES.items() if scheme.input_activations is not None])
def test_inputs_are_rounded_as_the_library_rounds_them(case: str, tmp_path: Path) -> None:
    written, arguments = write(tmp_path / "r", case, torch.float32), SCHEMES[case].input_activations
    assert arguments is not None
    width = 384 if case == "fp8 blocks" else written.linear.in_features  # the library wants whole groups
    x = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(6)) * torch.logspace(-3, 1, width)
    x[1, 4] = 0
    rounding = opened(written.folder).input_rounding(MODULE)
    assert rounding is not None
    assert torch.equal(rounding(x), forward_quantize(written.linear, x, "input", arguments))
    assert not torch.equal(rounding(x), x)


def test_the_last_group_of_a_token_may_be_short(tmp_path: Path) -> None:
    rounding = opened(write(tmp_path / "r", "fp8 blocks", torch.float32).folder).input_rounding(MODULE)
    assert rounding is not None and rounding.group == 128
    x = torch.randn(3, 328, generator=torch.Generator().manual_seed(7))
    rounded = rounding(x)
    for first in (0, 128, 256):
        part = x[:, first : first + 128]
        step = part.abs().amax(1, True) / 448
        assert torch.equal(rounded[:, first : first + 128], (part / step).to(torch.float8_e4m3fn).float() * step)


def test_one_number_may_come_without_a_dimension(tmp_path: Path) -> None:
    written = write(tmp_path / "r", "fp8 static", torch.bfloat16, loose=True)
    with opened(written.folder) as source:
        rounding = source.input_rounding(MODULE)
        assert torch.equal(source.read(NAME).bfloat16(), written.values)
        assert rounding is not None and rounding.scale == float(torch.tensor(0.0123).bfloat16())


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("fp8 static", {"input_scale": None}, "up_proj.input_scale is missing; fp8 tensor w8a8 static needs it"),
        ("fp8 static", {"weight_scale": torch.ones(56, 1)}, "up_proj.weight_scale has the shape [56, 1]"),
        ("fp8 dynamic", {"weight_scale": torch.ones(1)}, "up_proj: there is no matrix of scales"),
        ("int8", {"weight_scale": torch.ones(55, 1)}, "up_proj.weight_scale has the shape [55, 1], int8 channel w8a8 needs [56, 1]"),
    ],
)  # fmt: skip
def test_files_that_contradict_their_config_are_refused(
    case: str, change: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "r", case, torch.float32).folder
    tensors = load_file(folder / "model.safetensors")
    for last, tensor in change.items():
        tensors.pop(f"{MODULE}.{last}", None)
        tensors |= {} if tensor is None else {f"{MODULE}.{last}": tensor}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(words)):
        opened(folder)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_of_inputs_that_is_no_positive_number_is_named(scale: float, tmp_path: Path) -> None:
    folder = write(tmp_path / "r", "fp8 static", torch.float32).folder
    tensors = load_file(folder / "model.safetensors") | {f"{MODULE}.input_scale": torch.tensor([scale])}
    save_file(tensors, folder / "model.safetensors")
    with opened(folder) as source, pytest.raises(CheckpointError, match=r"up_proj.input_scale in .*model.safetensors is"):
        source.input_rounding(MODULE)


@pytest.mark.parametrize("case", SCHEMES)
def test_they_are_laid_out_packed_and_unpacked_and_not_written(case: str, tmp_path: Path) -> None:
    with opened(write(tmp_path / "r", case, torch.bfloat16).folder) as source:
        scheme, shape = source.stored[NAME].scheme, source.stored[NAME].shape
        assert scheme == scheme_of(source.config["quantization_config"], MODULE)
        read, rounding = source.quantized(NAME), source.input_rounding(MODULE)
    assert read is not None
    if rounding is not None and rounding.scale is not None:
        assert float(read.input_outer or 0) == rounding.scale
    tensors = pack(MODULE, read)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert found == {spec.name: (TORCH_DTYPE[spec.dtype], spec.shape) for spec in layout(MODULE, shape, scheme)}
    again = unpack(MODULE, tensors, scheme, shape)
    assert isinstance(again, Quantized) and torch.equal(again.dequantize(), read.dequantize())
    wrong = complaint(scheme, shape)
    assert (wrong is None) == (case == "fp8 dynamic") and (wrong is None or "not written" in wrong)
