"""Corrections as a LoRA: names, ranks and scaling by the rules of PEFT and vLLM, and read back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import DTYPE_CODE
from qwench.errors import CheckpointError
from qwench.formats.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, Corrected, adapter_config, layout, pack, rank_of

TRUNK = "model.language_model.layers"
SHAPES: dict[str, tuple[int, ...]] = {
    f"{TRUNK}.0.mlp.down_proj": (48, 80),
    f"{TRUNK}.1.mlp.down_proj": (48, 80),
    f"{TRUNK}.1.self_attn.k_proj": (12, 48),
    f"{TRUNK}.11.self_attn.k_proj": (12, 48),
    f"{TRUNK}.1.linear_attn.in_proj_qkv": (96, 48),
    **{f"{TRUNK}.1.mlp.experts.{e}.down_proj": (48, 20) for e in range(3)},
    "lm_head": (56, 48),
}
RANK = 32


def factors_of(shapes: dict[str, tuple[int, ...]], rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ranks = {m: rank_of(shape, rank) for m, shape in shapes.items()}
    return {
        m: (
            torch.randn(ranks[m], shape[1], generator=generator).bfloat16(),
            torch.randn(shape[0], ranks[m], generator=generator).bfloat16(),
        )
        for m, shape in shapes.items()
    }


def write(folder: Path, factors: dict[str, tuple[Tensor, Tensor]], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({n: t for m, f in factors.items() for n, t in pack(m, f).items()}, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return folder


def peft_value(pattern: dict[str, int], name: str, otherwise: int) -> int:
    """PEFT's `get_pattern_key`, and vLLM's `PEFTHelper._match_pattern`."""
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", name)), otherwise)


def gptqmodel_value(pattern: dict[str, int], name: str, otherwise: int) -> int:
    """GPTQModel's `Lora.dynamic_rank_override`."""
    return next((v for k, v in pattern.items() if name == k or k.endswith(name) or re.match(k, name)), otherwise)


def test_layout_promises_what_pack_returns() -> None:
    promised = {s.name: (s.dtype, s.shape) for s in layout(SHAPES, RANK)}
    packed = {n: t for m, f in factors_of(SHAPES).items() for n, t in pack(m, f).items()}
    assert {n: (DTYPE_CODE[t.dtype], tuple(t.shape)) for n, t in packed.items()} == promised
    name = f"base_model.model.{TRUNK}.1.self_attn.k_proj"
    assert promised[f"{name}.lora_A.weight"] == ("BF16", (12, 48))
    assert promised[f"{name}.lora_B.weight"] == ("BF16", (12, 12))
    assert promised["base_model.model.lm_head.lora_A.weight"] == ("BF16", (32, 48))


def test_every_reader_finds_each_rank_and_scales_by_one() -> None:
    config = adapter_config(SHAPES, RANK, "base")
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["task_type"]) == (RANK, RANK, "LORA", "CAUSAL_LM")
    assert config["base_model_name_or_path"] == "base"
    assert config["target_modules"] == ["down_proj", "in_proj_qkv", "k_proj", "lm_head"]
    for module, shape in SHAPES.items():
        rank = peft_value(config["rank_pattern"], module, config["r"])
        assert rank == rank_of(shape, RANK), module
        assert peft_value(config["alpha_pattern"], module, config["lora_alpha"]) == rank, module
        assert gptqmodel_value(config["rank_pattern"], module, config["r"]) == rank, module
    assert adapter_config({"lm_head": (56, 48)}, 16, "base")["rank_pattern"] == {}


def test_many_experts_make_a_short_pattern() -> None:
    shapes = {f"model.layers.{i}.mlp.experts.{e}.down_proj": (64, 24) for i in range(40) for e in range(64)}
    assert len(json.dumps(adapter_config(shapes | {"lm_head": (99, 64)}, 64, "base")["rank_pattern"])) < 300


def test_what_was_written_is_read(tmp_path: Path) -> None:
    factors = factors_of(SHAPES)
    adapter = Adapter(write(tmp_path / "a", factors, adapter_config(SHAPES, RANK, "base")))
    assert set(adapter.modules) == set(SHAPES)
    for module, (right, left) in factors.items():
        read_right, read_left = adapter.factors(module)
        assert read_right.dtype == read_left.dtype == torch.float32
        assert torch.equal(read_right, right.float()) and torch.equal(read_left, left.float())
        assert adapter.shape(module) == SHAPES[module]


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        ({"lora_alpha": 64}, 2.0),
        ({"lora_alpha": 64, "alpha_pattern": {"lm_head": 8}}, 0.25),
        ({"alpha_pattern": {"head": 8}}, 1.0),
        ({"lora_alpha": 64, "rank_pattern": {"lm_head": 16}}, 4.0),
        ({"r": 16, "lora_alpha": 8, "use_rslora": True}, 2.0),
    ],
)
def test_scaling_of_others_is_in_the_left_factor(tmp_path: Path, change: dict[str, Any], scaling: float) -> None:
    shapes: dict[str, tuple[int, ...]] = {"lm_head": (56, 48)}
    factors = factors_of(shapes)
    adapter = Adapter(write(tmp_path / "a", factors, adapter_config(shapes, RANK, "base") | change))
    assert torch.equal(adapter.factors("lm_head")[1], factors["lm_head"][1].float() * scaling)


def plain(folder: Path, modules: dict[str, tuple[int, ...]]) -> Checkpoint:
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    tensors = {f"{m}.weight": torch.randn(*shape, generator=generator).bfloat16() for m, shape in modules.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


def test_a_corrected_source_adds_the_correction(tmp_path: Path) -> None:
    source = plain(tmp_path / "s", SHAPES | {f"{TRUNK}.2.mlp.up_proj": (80, 48)})
    factors = factors_of(SHAPES)
    corrected = Corrected(source, Adapter(write(tmp_path / "a", factors, adapter_config(SHAPES, RANK, "base"))))
    assert corrected.tensors == source.tensors and corrected.folder == source.folder and corrected.config == source.config
    for module, (right, left) in factors.items():
        expected = source.read(f"{module}.weight").float() + left.float() @ right.float()
        for part in ((), (slice(3, 9),), (5,), (slice(2, 8), slice(1, 19)), (-1, slice(4, 6)), (2, 3), (slice(0, 5), 7)):
            read = corrected.read(f"{module}.weight", part)
            assert torch.allclose(read, expected[part], rtol=1e-5, atol=1e-5), (module, part)
    untouched = f"{TRUNK}.2.mlp.up_proj.weight"
    assert torch.equal(corrected.read(untouched), source.read(untouched)) and corrected.read(untouched).dtype == torch.bfloat16


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapter = Adapter(write(tmp_path / "a", factors_of(SHAPES), adapter_config(SHAPES, RANK, "base")))
    with pytest.raises(CheckpointError, match="corrects lm_head"):
        Corrected(plain(tmp_path / "one", SHAPES | {"lm_head": (57, 48)}), adapter)
    with pytest.raises(CheckpointError, match=r"0\.mlp\.down_proj"):
        Corrected(plain(tmp_path / "two", {m: s for m, s in SHAPES.items() if ".0." not in m}), adapter)


@pytest.mark.parametrize(
    ("names", "config", "words"),
    [
        (["base_model.model.lm_head.lora_A.weight"], {}, "lm_head has lora_B None"),
        (["base_model.model.lm_head.lora_B.weight"], {}, "make no correction"),
        (
            ["base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_magnitude_vector"],
            {},
            "make no correction",
        ),
        ([], {"use_dora": True}, "more than a LoRA: use_dora"),
        ([], {"bias": "all"}, "more than a LoRA: bias"),
        ([], {"r": None}, "r is None"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, names: list[str], config: dict[str, Any], words: str) -> None:
    folder = write(
        tmp_path / "a", factors_of({"lm_head": (56, 48)}), adapter_config({"lm_head": (56, 48)}, RANK, "base") | config
    )
    if names:
        save_file({name: torch.ones(3, 4) for name in names}, folder / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        Adapter(folder)
    assert error.value.mend


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(CONFIG_NAME)):
        Adapter(tmp_path)
