from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError
from qwench.formats.compressed_tensors import pack, quantization_config
from qwench.formats.release import Release, open_source
from qwench.numerics import SCHEMES, InputRounding, Quantized, Scheme, decode, encode

ROWS, COLUMNS = 150, 256
QUANTIZED = {
    "model.layers.0.mlp.up_proj": SCHEMES["int4"],
    "model.layers.0.mlp.down_proj": SCHEMES["int4-asym"],
    "model.layers.1.mlp.up_proj": SCHEMES["nvfp4"],
    "model.layers.1.mlp.down_proj": SCHEMES["mxfp4"],
    "model.layers.2.mlp.up_proj": SCHEMES["fp8"],
    "model.layers.2.mlp.down_proj": SCHEMES["fp8-block"],
    "model.layers.3.mlp.experts.0.gate_proj": SCHEMES["int8-asym"],
    "model.layers.4.mlp.up_proj": dataclasses.replace(SCHEMES["int4-asym"], ordered=True),
}
KEPT = ["model.layers.3.self_attn.q_proj", "lm_head"]


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5_text"} | config))
    return folder


def parts_of(schemes: dict[str, Scheme]) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rounded = {m: encode(torch.randn(ROWS, COLUMNS, generator=generator).bfloat16(), s) for m, s in schemes.items()}
    for m, s in schemes.items():
        if s.ordered and s.group:
            rounded[m].group_of_column = torch.randperm(COLUMNS, generator=generator).to(torch.int32) // s.group
    tensors = {name: tensor for m, q in rounded.items() for name, tensor in pack(m, q).items()}
    return rounded, tensors


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, dict[str, Quantized], dict[str, Tensor]]:
    rounded, tensors = parts_of(QUANTIZED)
    kept = {f"{m}.weight": torch.randn(6, COLUMNS).bfloat16() for m in KEPT} | {"model.norm.weight": torch.randn(COLUMNS)}
    folder = write(
        tmp_path_factory.mktemp("r") / "release", tensors | kept, {"quantization_config": quantization_config(QUANTIZED, KEPT)}
    )
    source = open_source(folder)
    assert isinstance(source, Release)
    return source, rounded, kept


def test_a_folder_without_quantization_is_a_plain_checkpoint(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "plain", {"model.norm.weight": torch.ones(3)}, {}))
    assert isinstance(source, Checkpoint)


def test_tensors_appear_under_their_unquantized_names(release: Any) -> None:
    source, rounded, kept = release
    assert set(source.tensors) == {f"{m}.weight" for m in rounded} | set(kept)
    for module in rounded:
        entry = source.tensors[f"{module}.weight"]
        assert (entry.name, entry.dtype, entry.shape) == (f"{module}.weight", "BF16", (ROWS, COLUMNS))
        assert entry.file == "model.safetensors"
    assert source.tensors["model.norm.weight"].dtype == "F32"


@pytest.mark.parametrize("module", QUANTIZED)
def test_quantized_weights_are_read_exactly(release: Any, module: str) -> None:
    source, rounded, _ = release
    whole = source.read(f"{module}.weight")
    assert whole.dtype == torch.float32
    assert torch.equal(whole, decode(rounded[module]))
    codes = source.quantized(f"{module}.weight")
    assert codes is not None
    assert torch.equal(codes.codes.view(torch.uint8), rounded[module].codes.view(torch.uint8))


@pytest.mark.parametrize("module", QUANTIZED)
@pytest.mark.parametrize(
    "part",
    [
        (slice(0, 10),), (slice(3, 133),), (slice(130, 131),), (slice(-7, None),), (slice(141, 150),), (7,), (-1,), (slice(5, 9), slice(16, 40)),
        (131, slice(None, 12)), (slice(20, 20),), (slice(2, 5), 3), (2, 3), (slice(90, 12), slice(0, 3)),
    ],
)  # fmt: skip
def test_parts_are_those_of_the_whole(release: Any, module: str, part: Any) -> None:
    source, rounded, _ = release
    assert torch.equal(source.read(f"{module}.weight", part), decode(rounded[module])[part])


def test_other_tensors_come_as_they_are_stored(release: Any) -> None:
    source, _, kept = release
    for name, tensor in kept.items():
        assert source.read(name).dtype == tensor.dtype
        assert torch.equal(source.read(name), tensor)
        assert torch.equal(source.read(name, (slice(1, 3),)), tensor[1:3])
        assert source.quantized(name) is None


@pytest.mark.parametrize("module", QUANTIZED)
def test_only_the_rows_that_are_asked_for_are_moved(release: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, _ = release
    moved = 0
    below = source.source.read

    def counting(name: str, part: Any = ()) -> Tensor:
        nonlocal moved
        tensor = below(name, part)
        moved += tensor.nbytes
        return tensor

    monkeypatch.setattr(source.source, "read", counting)
    source.read(f"{module}.weight", (slice(128, 136),))
    # FP8 blocks can only be read as blocks; 22 rows remain from row 128 on.
    assert moved <= (22 if "2.mlp.down" in module else 8) * (COLUMNS + 24) + 4


def test_the_part_must_fit(release: Any) -> None:
    source, _, _ = release
    name = "model.layers.0.mlp.up_proj.weight"
    for part in ((ROWS,), (-ROWS - 1,), (0, COLUMNS)):
        with pytest.raises(IndexError):
            source.read(name, part)
    with pytest.raises(ValueError, match="steps of 1"):
        source.read(name, (slice(0, 9, 2),))
    with pytest.raises(CheckpointError, match="holds no tensor"):
        source.read("model.layers.0.mlp.up_proj.weight_packed.weight")


def test_rows_of_integers_without_groups_know_their_width(tmp_path: Path) -> None:
    scheme = {"model.layers.0.mlp.up_proj": Scheme("int", 4)}
    written = encode(torch.randn(9, 37, generator=torch.Generator().manual_seed(1)), scheme["model.layers.0.mlp.up_proj"])
    tensors = pack("model.layers.0.mlp.up_proj", written)
    source = open_source(write(tmp_path / "r", tensors, {"quantization_config": quantization_config(scheme, [])}))
    assert source.tensors["model.layers.0.mlp.up_proj.weight"].shape == (9, 37)
    assert torch.equal(source.read("model.layers.0.mlp.up_proj.weight", (slice(2, 5),)), decode(written)[2:5])


def test_tensors_of_activations_are_not_shown(tmp_path: Path) -> None:
    scheme = {"model.layers.0.mlp.up_proj": SCHEMES["nvfp4"]}
    _, tensors = parts_of(scheme)
    tensors["model.layers.0.mlp.up_proj.input_global_scale"] = torch.ones(1)
    source = open_source(write(tmp_path / "r", tensors, {"quantization_config": quantization_config(scheme, [])}))
    assert list(source.tensors) == ["model.layers.0.mlp.up_proj.weight"]


MODULE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: c["ignore"].append(MODULE), "config.json says that"),
        (lambda t, c: t.pop(f"{MODULE}.weight_global_scale"), "weight_global_scale is missing"),
        (lambda t, c: t.pop(f"{MODULE}.weight_scale"), "no matrix of scales"),
        (lambda t, c: t.pop(f"{MODULE}.weight_packed"), "has scales and no codes"),
        (lambda t, c: t.update({f"{MODULE}.weight_packed": t[f"{MODULE}.weight_packed"][:, 1:].contiguous()}), "has the shape"),
        (lambda t, c: c.update(quant_method="awq"), "quantized with 'awq'"),
        (lambda t, c: c.update(quant_method="gptq"), "holds no qweight or scales"),
        (lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=3), "is stored as"),
    ],
)
def test_contradictions_stop_before_anything_is_read(tmp_path: Path, change: Any, words: str) -> None:
    scheme = {MODULE: SCHEMES["nvfp4"]}
    _, tensors = parts_of(scheme)
    config = quantization_config(scheme, [])
    change(tensors, config)
    with pytest.raises(CheckpointError, match=words) as error:
        open_source(write(tmp_path / "r", tensors, {"quantization_config": config}))
    assert error.value.mend


W4A4 = {MODULE: SCHEMES["nvfp4-w4a4"]}


def four_bit(folder: Path, divisor: float | None) -> Release:
    """A release with a weight whose inputs are rounded over this divisor; None: the file lacks it."""
    tensors = pack(
        MODULE,
        dataclasses.replace(encode(torch.randn(ROWS, COLUMNS), W4A4[MODULE]), input_outer=torch.tensor([divisor or 1.0])),
    )
    if divisor is None:
        del tensors[f"{MODULE}.input_global_scale"]
    source = open_source(write(folder, tensors, {"quantization_config": quantization_config(W4A4, KEPT)}))
    assert isinstance(source, Release)
    return source


def test_what_is_done_to_inputs_is_read_beside_the_weights(release: Any, tmp_path: Path) -> None:
    assert four_bit(tmp_path / "r", 37.25).input_rounding(MODULE) == InputRounding("nvfp4", 37.25)
    assert four_bit(tmp_path / "r", 37.25).input_rounding("model.layers.3.self_attn.q_proj") is None
    assert all(release[0].input_rounding(module) is None for module in QUANTIZED)
    fp8 = {MODULE: SCHEMES["fp8-w8a8"]}
    _, tensors = parts_of(fp8)
    source = open_source(write(tmp_path / "f", tensors, {"quantization_config": quantization_config(fp8, KEPT)}))
    assert isinstance(source, Release) and source.input_rounding(MODULE) == InputRounding("fp8")


@pytest.mark.parametrize("divisor", [0.0, -3.0, float("inf"), float("nan")])
def test_a_divisor_that_is_no_positive_number_is_named(divisor: float, tmp_path: Path) -> None:
    tensors = pack(
        MODULE, dataclasses.replace(encode(torch.randn(ROWS, COLUMNS), W4A4[MODULE]), input_outer=torch.tensor([divisor]))
    )
    source = open_source(write(tmp_path / "r", tensors, {"quantization_config": quantization_config(W4A4, KEPT)}))
    assert isinstance(source, Release)
    with pytest.raises(CheckpointError, match=r"up_proj.input_global_scale in .*model.safetensors is"):
        source.input_rounding(MODULE)


def test_a_missing_divisor_stops_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="input_global_scale is missing; nvfp4 g16 w4a4 needs it"):
        four_bit(tmp_path / "r", None)
