"""How engines decide: the questions that they ask of a config in different orders, where the answers differ."""

from __future__ import annotations

from typing import Any

import pytest

from qwench.loading import sglang_schemes, vllm_schemes
from qwench.loading.parts import Member, Module, Stop
from qwench.loading.sglang import PACKED
from qwench.loading.vllm import JOINED, PREFIXES
from qwench.loading.vllm import PACKED as VLLM_PACKED

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
INT8 = INT4 | {"num_bits": 8}


def linear(name: str) -> Module:
    return Module(name, name, "linear", (Member(name.rpartition(".")[2], (128, 256), name),))


def experts(name: str) -> Module:
    return Module(name, name, "experts", (Member("gate_proj", (128, 256), f"{name}.0.gate_proj", 0),))


def packed(groups: dict[str, tuple[list[str], dict[str, Any]]], ignore: list[str]) -> dict[str, Any]:
    made = {
        name: {"targets": targets, "weights": weights, "format": "pack-quantized"}
        for name, (targets, weights) in groups.items()
    }
    return {"quant_method": "compressed-tensors", "config_groups": made, "ignore": ignore, "format": "pack-quantized"}


def test_members_go_before_the_class_in_vllm_and_after_it_in_sglang() -> None:
    config = packed({"a": (["Linear"], INT4), "b": ([r"re:.*\.[qkv]_proj$"], INT8)}, [])
    qkv = linear("model.language_model.layers.3.self_attn.qkv_proj")
    ours, theirs = vllm_schemes.decider_of(config, PREFIXES, []), sglang_schemes.decider_of(config, True)
    assert getattr(ours.scheme(qkv, VLLM_PACKED["conditional"]), "bits", None) == 8
    assert getattr(theirs.scheme(qkv, PACKED), "bits", None) == 4


def test_what_nothing_names_is_unquantized_in_vllm_and_refused_by_sglang() -> None:
    config = packed({"a": ([r"re:.*mlp.*"], INT4)}, [])
    module = linear("model.language_model.layers.3.self_attn.o_proj")
    assert vllm_schemes.decider_of(config, PREFIXES, []).scheme(module, JOINED) is None
    with pytest.raises(Stop, match="no target means it"):
        sglang_schemes.decider_of(config, True).scheme(module, PACKED)


def test_exact_names_are_renamed_for_vllm_and_suffixes_mean_something_to_sglang() -> None:
    module = linear("language_model.model.layers.1.mlp.down_proj")
    full = packed({"a": (["Linear"], INT4)}, ["model.language_model.layers.1.mlp.down_proj"])
    assert vllm_schemes.decider_of(full, PREFIXES, []).scheme(module, JOINED) is None
    short = packed({"a": (["Linear"], INT4)}, ["mlp.down_proj"])
    assert vllm_schemes.decider_of(short, PREFIXES, []).scheme(module, JOINED) is not None
    assert sglang_schemes.decider_of(short, True).scheme(linear("model.language_model.layers.1.mlp.down_proj"), PACKED) is None


def test_headers_decide_for_vllm_and_not_for_sglang() -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "dynamic": {}}
    module, stored = linear("mtp.layers.0.self_attn.o_proj"), ["model.language_model.layers.0.mlp.down_proj"]
    assert vllm_schemes.decider_of(config, PREFIXES, stored).scheme(module, JOINED) is None
    assert sglang_schemes.decider_of(config, True).scheme(module, PACKED) is not None


def test_a_kept_head_is_seen_by_its_letters_in_vllm_and_experts_never_by_sglang() -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "dynamic": {"-:mtp.*": {}}}
    module = experts("mtp.layers.0.mlp.experts")
    assert vllm_schemes.decider_of(config, PREFIXES, [], mtp=True).scheme(module, JOINED) is None
    assert sglang_schemes.decider_of(config, True).scheme(module, PACKED) is not None


def test_expressions_are_searched_for_by_vllm_and_must_match_whole_in_sglang() -> None:
    config = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "extra_config": {r"layers\.\d+\.mlp": {"bits": 16}},
    }
    module = linear("model.language_model.layers.1.mlp.down_proj")
    assert vllm_schemes.decider_of(config, {}, []).scheme(module, JOINED) is None
    assert sglang_schemes.decider_of(config, True).scheme(module, PACKED) is not None
