from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.utils.match import match_named_modules, match_targets

from qwench.errors import CheckpointError
from qwench.formats.quantization_config import quantization_config, scheme_of, weight_arguments
from qwench.numerics import SCHEMES, Scheme
from tests.references.engine_names import sglang, vllm

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
INT4, NVFP4, INT8 = SCHEMES["int4"], SCHEMES["nvfp4"], SCHEMES["int8"]


def decoder_layer(prefix: str, full: bool, experts: int) -> list[str]:
    mixer = (
        [f"self_attn.{p}_proj" for p in "qkvo"]
        if full
        else [f"linear_attn.in_proj_{p}" for p in ("qkv", "z", "b", "a")] + ["linear_attn.out_proj"]
    )
    if not experts:
        return [f"{prefix}.{m}" for m in [*mixer, *(f"mlp.{p}" for p in PROJECTIONS)]]
    inside = [f"mlp.experts.{e}.{p}" for e in range(experts) for p in PROJECTIONS]
    shared = ["mlp.gate", "mlp.shared_expert_gate", *(f"mlp.shared_expert.{p}" for p in PROJECTIONS)]
    return [f"{prefix}.{m}" for m in [*mixer, *inside, *shared]]


def linears(experts: int = 0, trunk: str = "model.language_model", layers: int = 8) -> list[str]:
    """Every linear layer of a small Qwen3.5, by module path."""
    modules = [m for i in range(layers) for m in decoder_layer(f"{trunk}.layers.{i}", i % 4 == 3, experts)]
    modules += ["mtp.fc", *decoder_layer("mtp.layers.0", True, experts), "lm_head"]
    if trunk != "model":
        modules += [
            f"model.visual.blocks.{i}.{m}"
            for i in range(3)
            for m in ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
        ]
        modules += ["model.visual.merger.linear_fc1", "model.visual.merger.linear_fc2"]
    return modules


Rule = Callable[[str], Scheme | None]


def in_trunk(module: str) -> bool:
    return ".layers." in module and not module.startswith("mtp.")


def release_3(module: str) -> Scheme | None:
    return (
        NVFP4
        if in_trunk(module) and ("self_attn" in module or ".mlp." in module) and not module.endswith(("gate", "b", "a"))
        else None
    )


def with_gdn(module: str) -> Scheme | None:
    return (
        NVFP4 if release_3(module) or (in_trunk(module) and module.endswith(("in_proj_qkv", "in_proj_z", "out_proj"))) else None
    )


def mixed(module: str) -> Scheme | None:
    """INT8 attention, INT4 elsewhere, layer 0 and the MLP of layer 5 kept: releases 1 and 4 in one."""
    if not with_gdn(module) or ".layers.0." in module or ".layers.5.mlp" in module:
        return None
    return INT8 if "self_attn" in module else INT4


def experts_only(module: str) -> Scheme | None:
    return INT4 if in_trunk(module) and ".experts." in module and ".layers.2." not in module else None


def shared_apart(module: str) -> Scheme | None:
    return INT8 if ".shared_expert." in module and in_trunk(module) else experts_only(module)


def mtp_too(module: str) -> Scheme | None:
    return NVFP4 if release_3(module) or (module.startswith("mtp.layers") and not module.endswith("gate")) else None


def vision_and_head(module: str) -> Scheme | None:
    return INT8 if module == "lm_head" or ".visual.blocks.1." in module else release_3(module)


CASES: list[tuple[Rule, int, str]] = [
    (rule, experts, trunk)
    for trunk in ("model.language_model", "model")
    for rule, experts in [
        (release_3, 0), (release_3, 6), (with_gdn, 0), (mixed, 0), (mixed, 6), (experts_only, 6), (shared_apart, 6), (mtp_too, 0),
        (mtp_too, 6),
    ]
] + [(vision_and_head, 0, "model.language_model")]  # fmt: skip
cases = pytest.mark.parametrize(("rule", "experts", "trunk"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))


def build(rule: Rule, experts: int, trunk: str) -> tuple[dict[str, Any], dict[str, Scheme], list[str]]:
    modules = linears(experts, trunk)
    assigned = {m: s for m in modules if (s := rule(m))}
    kept = [m for m in modules if m not in assigned]
    config: dict[str, Any] = json.loads(json.dumps(quantization_config(assigned, kept)))
    return config, assigned, kept


def number_of(config: dict[str, Any], scheme: Scheme) -> int:
    """The group that stores a scheme."""
    return [g["weights"] for g in config["config_groups"].values()].index(weight_arguments(scheme))


@cases
def test_we_read_what_we_wrote(rule: Rule, experts: int, trunk: str) -> None:
    config, assigned, kept = build(rule, experts, trunk)
    for module, scheme in assigned.items():
        read = scheme_of(config, module)
        assert read is not None
        assert (read.kind, read.bits, read.group, read.block, read.symmetric) == (
            scheme.kind,
            scheme.bits,
            scheme.group,
            scheme.block,
            scheme.symmetric,
        )
    assert [m for m in kept if scheme_of(config, m)] == []


@cases
def test_transformers_decides_right(rule: Rule, experts: int, trunk: str) -> None:
    """By the matching functions of the library, on a model of real linear layers. transformers has no MTP head."""
    config, assigned, kept = build(rule, experts, trunk)
    model = module_tree([m for m in [*assigned, *kept] if not m.startswith("mtp.")])
    targets = {t: i for i, group in enumerate(config["config_groups"].values()) for t in group["targets"]}
    matched = {
        n: targets[match_targets(n, m, targets)[0]]
        for n, m in match_named_modules(model, targets, config["ignore"])
        if isinstance(m, torch.nn.Linear)
    }
    assert matched == {m: number_of(config, s) for m, s in assigned.items() if not m.startswith("mtp.")}


def module_tree(names: list[str]) -> torch.nn.Module:
    root = torch.nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        parent = root
        for step in path:
            if step not in dict(parent.named_children()):
                parent.add_module(step, torch.nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(leaf, torch.nn.Linear(1, 1, bias=False, device="meta"))
    return root


@cases
def test_vllm_decides_right(rule: Rule, experts: int, trunk: str) -> None:
    config, assigned, kept = build(rule, experts, trunk)
    conditional = trunk != "model"
    for module, scheme in assigned.items():
        assert vllm(config, module, conditional) == number_of(config, scheme), module
    for module in kept:
        assert vllm(config, module, conditional) is None, module


@cases
def test_sglang_decides_right(rule: Rule, experts: int, trunk: str) -> None:
    config, assigned, kept = build(rule, experts, trunk)
    for module, scheme in assigned.items():
        assert sglang(config, module) == number_of(config, scheme), module
    for module in kept:
        if module != "mtp.fc":  # built without a config there
            assert sglang(config, module) is None, module


def test_mtp_is_ignored_by_pattern_and_by_name() -> None:
    config, _, _ = build(release_3, 6, "model.language_model")
    assert r"re:^mtp\..*" in config["ignore"]
    names = [e for e in config["ignore"] if e.startswith("mtp.")]
    assert {"mtp.fc", "mtp.layers.0.self_attn.q_proj", "mtp.layers.0.mlp.experts.0.gate_proj"} <= set(names)
    assert not any(".experts.1." in n for n in names)


@pytest.mark.parametrize("rule", [experts_only, release_3, shared_apart])
def test_many_experts_make_a_short_config(rule: Rule) -> None:
    modules = linears(64, layers=40)
    assigned = {m: s for m in modules if (s := rule(m))}
    config = quantization_config(assigned, [m for m in modules if m not in assigned])
    assert len(assigned) > 7000
    assert len(json.dumps(config)) < 6000


def test_form_of_the_config() -> None:
    one, _, _ = build(release_3, 0, "model")
    assert one["format"] == "nvfp4-pack-quantized"
    assert one["quant_method"] == "compressed-tensors"
    assert one["quantization_status"] == "compressed"
    assert [g["targets"] for g in one["config_groups"].values()] == [["Linear"]]
    assert all(g["input_activations"] is None for g in one["config_groups"].values())
    both = quantization_config({"model.layers.0.mlp.up_proj": INT4, "model.layers.0.mlp.down_proj": NVFP4}, [])
    assert both["format"] == "mixed-precision"
    assert {g["format"] for g in both["config_groups"].values()} == {"pack-quantized", "nvfp4-pack-quantized"}


def test_the_choice_of_scales_makes_no_group_of_its_own() -> None:
    searched = Scheme("nvfp4", 4, 16, search="mse")
    config = quantization_config({"model.layers.0.mlp.up_proj": NVFP4, "model.layers.1.mlp.up_proj": searched}, [])
    assert len(config["config_groups"]) == 1


PUBLISHED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*linear_attn.*", "model.layers.0.mlp.up_proj"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}},
        "group_1": {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel", "group_size": None}},
        "group_2": {"targets": ["model.layers.1.self_attn.q_proj"], "weights": None},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.1.mlp.up_proj", Scheme("int", 4, group=128)),
        ("model.layers.1.self_attn.k_proj", Scheme("int", 8, symmetric=False)),
        ("model.layers.1.self_attn.q_proj", None),
        ("model.layers.0.mlp.up_proj", None),
        ("model.layers.0.linear_attn.out_proj", None),
        ("lm_head", None),
    ],
)
def test_configs_of_others_are_read(module: str, expected: Scheme | None) -> None:
    assert scheme_of(PUBLISHED, module) == expected


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 128},
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "actorder": "group"},
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "int", "strategy": "channel"},  # of int-quantized, W8A8
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 128]},
    ],
)
def test_formats_that_we_cannot_read_are_refused(weights: dict[str, Any]) -> None:
    config = {"format": "int-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        scheme_of(config, "model.layers.0.mlp.up_proj")


def test_other_methods_are_refused() -> None:
    with pytest.raises(CheckpointError, match="gptq"):
        scheme_of({"quant_method": "gptq", "bits": 4}, "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("nvfp4-w4a4", {}, "nvfp4"),
        ("nvfp4-w4a4", {"observer": "static_minmax"}, "nvfp4"),
        ("nvfp4-w4a4", {"dynamic": False}, ""),
        ("nvfp4-w4a4", {"group_size": 32}, ""),
        ("fp8-w8a8", {}, "fp8"),
        ("fp8-w8a8", {"strategy": "tensor", "dynamic": False}, "fp8-tensor"),
        ("fp8-w8a8", {"strategy": "tensor"}, ""),
        ("fp8-w8a8", {"symmetric": False}, ""),
        ("fp8-w8a8", {"type": "int"}, ""),
    ],
)
def test_activations_are_read_where_they_are_known(name: str, change: dict[str, Any], expected: str) -> None:
    """A release whose inputs we cannot round is not read: it would be measured better than it is."""
    module = "model.layers.0.mlp.up_proj"
    config = quantization_config({module: SCHEMES[name]}, [])
    config["config_groups"]["group_0"]["input_activations"] |= change
    if expected:
        read = scheme_of(config, module)
        assert read is not None and read.activations == expected and read.kind == SCHEMES[name].kind
    else:
        with pytest.raises(CheckpointError, match=r"up_proj is stored as .* with inputs \{'actorder'"):
            scheme_of(config, module)


@pytest.mark.parametrize(
    ("preset", "scheme"),
    [
        ("FP8_DYNAMIC", Scheme("fp8", 8, activations="fp8")),
        ("FP8", Scheme("fp8", 8, tensor=True, activations="fp8-tensor")),
        ("FP8_BLOCK", Scheme("fp8", 8, block=(128, 128), activations="fp8-group")),
        ("W8A8", Scheme("int", 8, activations="int8")),
    ],
)
def test_what_the_library_writes_is_read_and_what_we_write_means_the_same(preset: str, scheme: Scheme) -> None:
    made = preset_name_to_scheme(preset, ["Linear"])
    group = made.model_dump(mode="json") | {"format": infer_module_format(torch.nn.Linear, made).value}
    config = {
        "quant_method": "compressed-tensors",
        "format": group["format"],
        "config_groups": {"group_0": group},
        "ignore": [],
    }
    assert scheme_of(config, "model.layers.0.mlp.up_proj") == scheme
    ours = quantization_config({"model.layers.0.mlp.up_proj": scheme}, [])
    theirs = QuantizationConfig.model_validate(ours).config_groups["group_0"]
    for mine, written in ((theirs.weights, made.weights), (theirs.input_activations, made.input_activations)):
        assert mine is not None and written is not None
        for key in ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size", "block_structure"):
            assert getattr(mine, key) == getattr(written, key), key


def test_integers_one_to_a_byte_want_integer_inputs() -> None:
    config = quantization_config({"model.layers.0.mlp.up_proj": Scheme("int", 8, tensor=True, activations="int8")}, [])
    assert config["format"] == "int-quantized" and scheme_of(config, "model.layers.0.mlp.up_proj") is not None
    group = config["config_groups"]["group_0"]
    for change in (
        {"input_activations": None},
        {"format": "pack-quantized"},
        {"format": "pack-quantized", "input_activations": None},
    ):
        with pytest.raises(CheckpointError, match="up_proj is stored as"):
            scheme_of(config | {"config_groups": {"group_0": group | change}}, "model.layers.0.mlp.up_proj")


def test_weights_alone_and_with_activations_are_two_groups() -> None:
    both = {"model.layers.0.mlp.up_proj": SCHEMES["nvfp4"], "model.layers.0.mlp.down_proj": SCHEMES["nvfp4-w4a4"]}
    config = quantization_config(both, [])
    assert config["format"] == "nvfp4-pack-quantized" and len(config["config_groups"]) == 2
    assert {m: scheme_of(config, m) for m in both} == both
