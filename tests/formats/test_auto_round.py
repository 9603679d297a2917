"""auto-round's container: GPTQ's bytes without an order, and what its readers make of our config."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwench.checkpoint.source import TORCH_DTYPE
from qwench.errors import CheckpointError
from qwench.formats import gptq
from qwench.formats.auto_round import complaint, layout, notes, pack, quantization_config, scheme_of, sidecars, unpack
from qwench.formats.release import open_source
from qwench.numerics import SCHEMES, Scheme, decode
from tests.formats.test_gptq import (
    MODULE,
    SEVERAL,
    SHAPES,
    Rule,
    bare,
    cases,
    only_experts,
    quantized_of,
    release_4,
    with_holes,
)
from tests.formats.test_quantization_config import linears
from tests.references import gptq_bytes
from tests.references.engine_names import auto_round, vllm_auto_round

CASES = [(name, shape) for name in SEVERAL for shape in SHAPES]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_bytes_are_gptqs_without_order(name: str, shape: tuple[int, int]) -> None:
    written = quantized_of(SEVERAL[name], shape)
    ours, theirs = pack(MODULE, written), gptq.pack(MODULE, written)
    assert ours.keys() == theirs.keys() - {f"{MODULE}.g_idx"}
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    promised = {s.name: (TORCH_DTYPE[s.dtype], s.shape) for s in layout(MODULE, shape, written.scheme)}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in ours.items()} == promised


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_unpack_is_the_inverse_of_pack_and_of_a_literal_reader(name: str, shape: tuple[int, int]) -> None:
    written = quantized_of(SEVERAL[name], shape)
    tensors = pack(MODULE, written)
    read = unpack(MODULE, tensors, written.scheme, shape)
    assert torch.equal(read.codes, written.codes) and torch.equal(read.scales, written.scales)
    assert read.group_of_column is None and read.zeros is None
    literal = gptq_bytes.read(bare(tensors), written.scheme.bits, more=1, group=written.scheme.group or shape[1])
    assert torch.equal(literal, decode(written))


def test_negative_scales_are_kept() -> None:
    written = quantized_of(Scheme("int", 4, group=16, full_range=True), (24, 96))
    assert bool((written.scales < 0).any()) and bool((written.scales > 0).any())
    assert bool((pack(MODULE, written)[f"{MODULE}.scales"] < 0).any())


def test_what_it_cannot_hold() -> None:
    assert "place for the order" in str(complaint(Scheme("int", 4, group=32, ordered=True), (16, 128)))
    assert complaint(SCHEMES["nvfp4"], (16, 128)) == "auto-round holds integers, not nvfp4"
    assert complaint(SCHEMES["int4"], (16, 128)) is None
    assert not notes([SCHEMES["int4"]]) and not sidecars({})


def build(rule: Rule, experts: int, trunk: str) -> tuple[dict[str, Any], dict[str, Scheme], list[str]]:
    modules = linears(experts, trunk)
    assigned = {m: dataclasses.replace(s, ordered=False) for m in modules if (s := rule(m))}
    kept = [m for m in modules if m not in assigned]
    config: dict[str, Any] = json.loads(json.dumps(quantization_config(assigned, kept)))
    return config, assigned, kept


@cases
def test_we_read_what_we_wrote(rule: Rule, experts: int, trunk: str) -> None:
    config, assigned, kept = build(rule, experts, trunk)
    for module, scheme in assigned.items():
        assert scheme_of(config, module) == dataclasses.replace(scheme, full_range=False), module
    assert [m for m in kept if scheme_of(config, m)] == []


@cases
def test_vllm_decides_right(rule: Rule, experts: int, trunk: str) -> None:
    config, assigned, kept = build(rule, experts, trunk)
    for module, scheme in assigned.items():
        conditional = trunk != "model" and not module.startswith("mtp.")  # the head is a model of its own, without renaming
        assert vllm_auto_round(config, module, conditional) == (scheme.bits, scheme.group), module
    for module in kept:
        conditional = trunk != "model" and not module.startswith("mtp.")
        assert vllm_auto_round(config, module, conditional) is None, module


@cases
def test_auto_round_decides_right(rule: Rule, experts: int, trunk: str) -> None:
    """In transformers, which has no MTP head."""
    config, assigned, _ = build(rule, experts, trunk)
    modules = [m for m in linears(experts, trunk) if not m.startswith("mtp.")]
    for module in modules:
        expected = (assigned[module].bits, assigned[module].group) if module in assigned else None
        assert auto_round(config, module, modules) == expected, module


def test_form_of_the_config() -> None:
    config, _, _ = build(release_4, 0, "model.language_model")
    extra = config.pop("extra_config")
    assert config == {
        "bits": 4, "block_name_to_quantize": "model.language_model.layers", "data_type": "int", "group_size": 128,
        "packing_format": "auto_round:auto_gptq", "quant_method": "auto-round", "sym": True,
    }  # fmt: skip
    assert sorted({values["bits"] for values in extra.values()}) == [8, 16]


def test_many_experts_make_a_short_config() -> None:
    for rule in (release_4, with_holes, only_experts):
        modules = linears(64, layers=40)
        assigned = {m: s for m in modules if (s := rule(m))}
        config = quantization_config(assigned, [m for m in modules if m not in assigned])
        assert len(json.dumps(config)) < 4000


PEER: dict[str, Any] = {
    "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 128, "sym": True, "data_type": "int",
    "block_name_to_quantize": "model.layers",
    "extra_config": {
        "model.layers.0.self_attn.q_proj": {"bits": 16, "data_type": "float"}, "lm_head": {"bits": 8},
        r".*mlp\.gate$": {"bits": 16}, r".*in_proj_z": {"bits": 8, "group_size": -1},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.0.mlp.experts.3.up_proj", Scheme("int", 4, 128)),
        ("model.layers.0.self_attn.q_proj", None),
        ("model.layers.1.self_attn.q_proj", Scheme("int", 4, 128)),
        ("model.layers.1.mlp.gate", None),
        ("model.layers.1.linear_attn.in_proj_z", Scheme("int", 8)),
        ("lm_head", Scheme("int", 8, 128)),
        ("mtp.fc", None),
    ],
)
def test_configs_of_others_are_read(module: str, expected: Scheme | None) -> None:
    assert scheme_of(PEER, module) == expected


def test_without_stacks_everything_but_the_head_is_quantized() -> None:
    config = {key: value for key, value in PEER.items() if key not in ("block_name_to_quantize", "extra_config")}
    assert scheme_of(config, "model.layers.0.mlp.up_proj") == Scheme("int", 4, 128)
    assert scheme_of(config, "lm_head") is None
    listed = config | {"block_name_to_quantize": [["model.layers.0", "model.layers.1"]]}
    assert scheme_of(listed, "model.layers.1.mlp.up_proj") and not scheme_of(listed, "model.layers.2.mlp.up_proj")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"packing_format": "auto_round:auto_awq"}, "auto_awq"), ({"data_type": "mx_fp"}, "mx_fp"), ({"bits": 2}, "2 bits"),
        ({"extra_config": {"*": {}}}, "no pattern"),
    ],
)  # fmt: skip
def test_configs_that_we_cannot_read_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        scheme_of(PEER | change, "model.layers.0.mlp.up_proj")
    assert error.value.mend


def test_a_release_is_read_back(tmp_path: Path) -> None:
    rounded = {f"model.layers.{i}.mlp.up_proj": quantized_of(scheme, (40, 96)) for i, scheme in enumerate(SEVERAL.values())}
    tensors = {name: tensor for m, q in rounded.items() for name, tensor in pack(m, q).items()} | {
        "lm_head.weight": torch.ones(5, 96)
    }
    config = quantization_config({m: q.scheme for m, q in rounded.items()}, ["lm_head"])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5_text", "quantization_config": config}))
    source = open_source(tmp_path)
    assert set(source.tensors) == {f"{m}.weight" for m in rounded} | {"lm_head.weight"}
    for module, written in rounded.items():
        assert torch.equal(source.read(f"{module}.weight"), decode(written))
        assert torch.equal(source.read(f"{module}.weight", (slice(5, 21), slice(3, 50))), decode(written)[5:21, 3:50])
