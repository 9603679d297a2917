"""Eight-bit releases of others in compressed-tensors: that ours are as theirs, what is told of them, what mends them, and transformers' own loader beside its table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as library
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError
from qwench.formats.release import open_source
from qwench.loading import transformers
from qwench.loading.eight_bits import pieces
from qwench.loading.findings import Finding
from qwench.loading.parts import Member, Module
from qwench.loading.proof import prove
from qwench.steps.checks.mend import mended
from tests.loading import eight_bits, others

MODULE = "model.layers.0.mlp.up_proj"
WRITERS = {
    "FP8 by row": (eight_bits.fp8_rows, eight_bits.said("channel", eight_bits.TOKENS)),
    "FP8 with one scale": (eight_bits.fp8_one, eight_bits.said("tensor", eight_bits.ALL_TOKENS)),
    "FP8 in blocks": (eight_bits.fp8_blocks(64), eight_bits.said("block", eight_bits.TOKENS | {"strategy": "group", "group_size": 64}, block=64)),
    "INT8 by row": (eight_bits.int8_rows, eight_bits.said("channel", eight_bits.TOKENS, "int")),
    "INT8 with one scale": (eight_bits.int8_one, eight_bits.said("tensor", eight_bits.TOKENS, "int")),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("others")


@pytest.mark.parametrize("name", WRITERS)
def test_bytes_and_config_are_those_of_the_library(name: str) -> None:
    write, config = WRITERS[name]
    weight = torch.randn(200, 136, generator=torch.Generator().manual_seed(4))
    written = {key.rpartition(".")[2]: tensor for key, tensor in write(MODULE, weight).items()}
    read = QuantizationConfig.model_validate(config([MODULE], ["lm_head"]))
    scheme = read.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(read.format)
    state = {"weight": weight, "weight_scale": written["weight_scale"].float()}
    theirs: Mapping[str, Tensor] = compressor.compress(state, scheme)
    assert theirs["weight"].dtype == written["weight"].dtype and theirs["weight_scale"].shape == written["weight_scale"].shape
    assert torch.equal(theirs["weight"].view(torch.uint8), written["weight"].contiguous().view(torch.uint8))


def findings(folder: Path, engine: str) -> tuple[Finding, ...]:
    with Checkpoint.open(folder) as source:
        return prove(source, engine).findings


@pytest.mark.parametrize(
    ("case", "engine", "words", "file"),
    [
        ("good moe ct int8", "sglang", "on NPUs only", "compressed_tensors.py, get_moe_scheme"),
        ("ct int8 experts, one scale", "vllm", "they need a scale for each row", "get_moe_method"),
        ("ct fp8 experts by row, static inputs", "vllm", "experts in fp8 channel w8a8 static", "get_moe_method"),
        ("ct fp8 experts by row, static inputs", "sglang", "experts in fp8 channel w8a8 static", "compressed_tensors_w8a8_fp8_moe.py"),
        ("ct fp8 blocks that do not divide", "vllm", "192 rows of what is joined, which blocks of 128 do not divide", "validate_fp8_block_shape"),
        ("good moe ct fp8 blocks", "transformers", "with scales of blocks are not decoded", "CompressedTensorsDequantize.convert"),
        ("good moe ct int8", "transformers", "integers one to a byte are not decoded", "CompressedTensorsDequantize.convert"),
        ("good moe ct fp8", "transformers", "inputs of experts are not rounded, where the release says fp8 channel w8a8", "CompressedTensorsDequantize"),
        ("good dense ct fp8 static", "vllm", "have one scale each, and not the same", ""),
        ("good moe ct fp8 static", "sglang", "have one scale each, and not the same", ""),
        ("ct int8: says fp8", "vllm", "integer or packed codes are copied into a parameter of FP8 codes, where they stand for other numbers", "AutoWeightsLoader._load_param"),
    ],
)  # fmt: skip
def test_what_is_told_cites_the_rule(case: str, engine: str, words: str, file: str, home: Path) -> None:
    found = findings(others.make(home, case), engine)
    assert any(words in finding.what and file in finding.rule for finding in found), found


def test_weight_only_blocks_have_no_method_in_sglang(home: Path) -> None:
    folder = others.make(home, "good dense ct fp8 blocks")
    config = {**Checkpoint.open(folder).config}
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    with Checkpoint.open(folder) as source:
        source.config = config
        assert prove(source, "vllm").good
        (finding,) = (f for f in prove(source, "sglang").findings if f.where == "Qwen3_5ForConditionalGeneration")
    assert finding.level == "refuses" and "weight-only FP8 in blocks has no method" in finding.what


def test_inputs_that_nobody_was_asked_about_are_not_told(home: Path) -> None:
    """Asymmetric inputs: engines may read them, and what they build was not looked at."""
    with Checkpoint.open(others.make(home, "good dense ct int8")) as source:
        source.config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
        with pytest.raises(CheckpointError, match="with inputs"):
            prove(source, "vllm")


CURED = [
    "ct fp8: head missing from ignore", "ct fp8: head of experts missing from ignore", "ct fp8: half of a joined module in ignore", "ct int8: head missing from ignore",
]  # fmt: skip


@pytest.mark.parametrize("case", CURED)
def test_lists_are_mended_and_groups_stay(case: str, home: Path) -> None:
    with Checkpoint.open(others.make(home, case)) as source:
        found = mended(source)
    assert found.told and all(proof.good for proof in found.after.values())
    (was,), (now,) = ([*c["quantization_config"]["config_groups"].values()] for c in (source.config, found.config))
    assert {**now, "targets": was["targets"]} == was and now["targets"][0] == "Linear"


@pytest.mark.parametrize("case", ["ct fp8: says one scale", "ct fp8: says static inputs", "ct fp8 static: says dynamic inputs"])
def test_what_is_stored_otherwise_than_it_is_said_is_left_alone(case: str, home: Path) -> None:
    with Checkpoint.open(others.make(home, case)) as source:
        assert mended(source).told == []


GOOD = [f"good {model} ct {kind}" for model in ("dense", "moe") for kind in ("fp8", "fp8 static", "fp8 blocks", "int8")]


@pytest.mark.parametrize("case", GOOD)
def test_transformers_loads_what_its_table_says(case: str, home: Path) -> None:
    folder = others.make(home, case)
    with Checkpoint.open(folder) as source:
        (load,) = transformers.replay(source.config, source.tensors)
    if load.refusals:
        with pytest.raises(RuntimeError, match="automatic conversion"):
            loaded(folder)
        return
    model, report = loaded(folder)
    assert not report["missing_keys"] and not load.unfilled and not load.misfits
    left = {name for name, dropped in load.dropped.items() if not dropped.designed}
    assert left == {name for name in report["unexpected_keys"] if not name.startswith("mtp.")}
    assert bool(left) == (case == "good moe ct fp8 static")
    if "moe" in case:
        name = "model.language_model.layers.2.mlp.experts"
        gate, up = (open_source(folder).read(f"{name}.3.{half}_proj.weight") for half in ("gate", "up"))
        assert torch.equal(model.get_parameter(f"{name}.gate_up_proj")[3], torch.cat([gate, up]).bfloat16())


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, report = library.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, local_files_only=True
    )
    return model, report


def test_a_projection_of_gated_deltanet_is_cut_into_keys_and_values() -> None:
    members = (Member("in_proj_qkv", (768, 128), "a.in_proj_qkv"), Member("in_proj_z", (384, 128), "a.in_proj_z"))
    assert pieces(Module("a.in_proj_qkvz", "a.in_proj_qkvz", "linear", members)) == [192, 192, 384, 384]
    assert pieces(Module("a.in_proj_qkv", "a.in_proj_qkv", "linear", members[:1])) == [768]
