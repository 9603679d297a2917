"""The map in every layout, every complaint, and the published configs."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError
from qwench.models import map_of, sketch, survey
from qwench.models.map import ROLES, ModelMap
from tests.support.memory import MemorySource, tiny_source
from tests.support.tiny import tiny_config, tiny_shapes, write_tiny

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
TEXT = "model.language_model."


def published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


def complaint(source: MemorySource) -> str:
    with pytest.raises(CheckpointError) as caught:
        map_of(source)
    return str(caught.value)


def values_of(map: ModelMap, source: MemorySource) -> dict[str, Tensor]:
    """Every weight by its module without the decoder's prefix: what has to be the same in all layouts."""
    found = {}
    for slot in map.slots():
        value = source.read(slot.tensor, slot.part)
        assert tuple(value.shape) == slot.shape, slot
        found["/".join((slot.role, slot.module.replace(map.prefix, "", 1)))] = value
    return found


DENSE = [
    dict(layout=a, tied=b, mtp=c)
    for a, b, c in itertools.product(("conditional", "causal"), (False, True), ("published", None))
]
SPARSE = [
    dict(moe=True, layout=a, trunk_experts=b, mtp=c)
    for a, b, c in itertools.product(("conditional", "causal"), ("fused", "single"), ("fused", "single", None))
]


@pytest.mark.parametrize("options", [*DENSE, *SPARSE], ids=lambda o: "-".join(str(v) for v in o.values()))
def test_every_layout_is_mapped_whole(options: dict[str, Any]) -> None:
    source = tiny_source(**options)
    map = map_of(source)
    assert {s.tensor for s in map.slots()} == set(source.values)
    assert map.prefix == (TEXT if options["layout"] == "conditional" else "model.")
    assert map.model_type == ("qwen3_5_moe" if options.get("moe") else "qwen3_5")
    assert map.has_mtp == (options["mtp"] is not None)
    assert map.has_vision == (options["layout"] == "conditional")
    assert map.tied == options.get("tied", False)
    assert [b.kind for b in map.blocks] == ["linear_attention"] * 3 + ["full_attention"]
    assert {s.role for s in map.slots() if not s.role.startswith("vision.")} <= set(ROLES)
    covered = Counter[str]()
    for slot in map.slots():
        covered[slot.tensor] += source.values[slot.tensor][slot.part].numel()
    assert covered == {n: t.numel() for n, t in source.values.items()}, "parts cover each tensor exactly once"


def split(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with experts stored one by one, done by hand."""
    done = {}
    for name, value in values.items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, both in enumerate(value):
                done[f"{stem}.{e}.gate_proj.weight"], done[f"{stem}.{e}.up_proj.weight"] = both.chunk(2)
        elif last == "down_proj":
            done |= {f"{stem}.{e}.down_proj.weight": down for e, down in enumerate(value)}
        else:
            done[name] = value
    return done


def test_fused_and_single_experts_are_the_same_weights() -> None:
    fused = tiny_source(moe=True, mtp="fused")
    single = MemorySource(fused.config, split(fused.values))
    assert len(single.values) > len(fused.values)
    expected, found = (values_of(map_of(s), s) for s in (fused, single))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_projections_of_one_layer_may_be_stored_differently() -> None:
    source = tiny_source(moe=True)
    name = f"{TEXT}layers.1.mlp.experts.down_proj"
    source.values |= {f"{TEXT}layers.1.mlp.experts.{e}.down_proj.weight": w for e, w in enumerate(source.values.pop(name))}
    block = map_of(source).blocks[1]
    assert block.slot("expert.down", 4).tensor == f"{TEXT}layers.1.mlp.experts.4.down_proj.weight"
    assert block.slot("expert.gate", 4).part == (4, slice(0, 256))


def test_gate_is_the_upper_half_and_up_the_lower() -> None:
    """Against transformers: its experts split `gate_up_proj` into gate, then up."""
    source = tiny_source(moe=True)
    block = map_of(source).blocks[2]
    gate, up = source.values[f"{TEXT}layers.2.mlp.experts.gate_up_proj"][5].chunk(2, dim=0)
    assert torch.equal(source.read(block.slot("expert.gate", 5).tensor, block.slot("expert.gate", 5).part), gate)
    assert torch.equal(source.read(block.slot("expert.up", 5).tensor, block.slot("expert.up", 5).part), up)


def test_modules_are_named_one_by_one() -> None:
    map = map_of(tiny_source(moe=True))
    assert map.blocks[3].slot("expert.up", 2).module == f"{TEXT}layers.3.mlp.experts.2.up_proj"
    assert map.blocks[0].slot("delta.A_log").module == f"{TEXT}layers.0.linear_attn.A_log"
    assert map.blocks[0].slot("router").module == f"{TEXT}layers.0.mlp.gate"
    assert map.mtp[0].slot("mtp.expert.down", 1).module == "mtp.layers.0.mlp.experts.1.down_proj"
    assert map.other("vision.blocks.1.attn.qkv.weight").module == "model.visual.blocks.1.attn.qkv"
    assert map.other("vision.blocks.1.attn.qkv.bias").module == "model.visual.blocks.1.attn.qkv.bias"
    with pytest.raises(KeyError, match=r"mlp\.gate"):
        map.blocks[0].slot("mlp.gate")


def test_a_folder_in_several_shards(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", moe=True, layout="causal", trunk_experts="single", shards=3)
    with Checkpoint.open(folder) as source:
        map = map_of(source)
        gate, up = (source.tensors[map.blocks[0].slot(role, 0).tensor] for role in ("expert.gate", "expert.up"))
    assert gate.file != up.file


# What is wrong with a checkpoint.


def test_a_tensor_that_plays_no_role_is_named() -> None:
    source = tiny_source(moe=True)
    source.values["model.language_model.layers.2.mlp.extra.weight"] = torch.zeros(3)
    source.values["stray"] = torch.zeros(2)
    for i in range(4):
        source.values[f"model.language_model.layers.{i}.adapter.weight"] = torch.zeros(2)
    text = complaint(source)
    assert "6 stored tensors play no role" in text
    assert "stray" in text and "layers.2.mlp.extra.weight" in text and "layers.{0..3}.adapter.weight (4)" in text


def test_missing_tensors_are_counted_and_named() -> None:
    source = tiny_source()
    del source.values["lm_head.weight"]
    for i in range(3):
        del source.values[f"{TEXT}layers.{i}.linear_attn.in_proj_z.weight"]
    text = complaint(source)
    assert "4 of the 56 text tensors that config.json asks for are missing" in text
    assert "lm_head.weight" in text and f"{TEXT}layers.{{0..2}}.linear_attn.in_proj_z.weight (3)" in text


def test_a_wrong_shape_is_told_with_both_shapes_and_the_file() -> None:
    source = tiny_source()
    source.values[f"{TEXT}layers.3.self_attn.q_proj.weight"] = torch.zeros(384, 128)
    text = complaint(source)
    assert f"{TEXT}layers.3.self_attn.q_proj.weight in model.safetensors is [384, 128], config.json says [768, 128]" in text


def test_all_complaints_come_at_once() -> None:
    source = tiny_source()
    source.values["stray"] = torch.zeros(2)
    del source.values["mtp.fc.weight"], source.values[f"{TEXT}norm.weight"], source.values["model.visual.pos_embed.weight"]
    source.values[f"{TEXT}layers.0.mlp.up_proj.weight"] = torch.zeros(4, 4)
    text = complaint(source)
    for said in ("stray", "mtp.fc.weight", f"{TEXT}norm.weight", "model.visual.pos_embed.weight", "[4, 4]"):
        assert said in text
    assert len(survey(source).complaints) == 5


def test_half_an_mtp_head_is_reported_as_such() -> None:
    source = tiny_source()
    del source.values["mtp.layers.0.self_attn.k_norm.weight"]
    text = complaint(source)
    assert "the MTP head is incomplete: 14 of 15 tensors are stored, missing: mtp.layers.0.self_attn.k_norm.weight" in text
    assert survey(source).mtp == "incomplete"


def test_half_a_moe_head_is_not_a_thousand_lines() -> None:
    source = tiny_source(moe=True, mtp="single")
    for e in range(6):
        del source.values[f"mtp.layers.0.mlp.experts.{e}.up_proj.weight"]
    text = complaint(source)
    assert "29 of 35 tensors are stored, missing: mtp.layers.0.mlp.experts.{0..5}.up_proj.weight (6)" in text


@pytest.mark.parametrize(("mtp", "tensors"), [("published", 15), ("fused", 19), ("single", 17 + 3 * 6)])
def test_mtp_heads_of_every_kind(mtp: Any, tensors: int) -> None:
    source = tiny_source(moe=mtp != "published", mtp=mtp)
    assert sum(n.startswith("mtp.") for n in source.values) == tensors
    assert survey(source).mtp == "present"
    assert map_of(source).mtp[0].kind == "full_attention"


def test_a_head_that_only_the_config_knows_is_missing_and_legal() -> None:
    source = tiny_source()
    source.values = {n: t for n, t in source.values.items() if not n.startswith("mtp.")}
    assert not map_of(source).has_mtp
    assert survey(source).mtp == "missing"


def test_a_head_that_the_config_does_not_know_is_claimed() -> None:
    source = tiny_source()
    source.config["text_config"]["mtp_num_hidden_layers"] = 0
    assert map_of(source).has_mtp


@pytest.mark.parametrize("experts", ["fused", "single"])
def test_expert_counts_that_disagree(experts: Any) -> None:
    source = tiny_source(moe=True, trunk_experts=experts)
    for i in range(4):
        source.values[f"{TEXT}layers.{i}.mlp.gate.weight"] = torch.zeros(5, 128)
    found = survey(source).complaints
    stored = "mlp.experts.gate_up_proj 6, mlp.experts.down_proj 6" if experts == "fused" else "experts stored one by one 6"
    assert [what for what, _ in found] == [
        f"{TEXT}layers.{{0..3}} (4): the numbers of experts disagree: config.json 6, mlp.gate.weight 5, {stored}"
    ]


def test_a_pruned_trunk_with_an_unpruned_head_is_refused() -> None:
    config = tiny_config(moe=True)
    config["text_config"]["num_experts"] = 4
    shapes = {n: s for n, s in tiny_shapes(config).items() if not n.startswith("mtp.")}
    whole = tiny_source(moe=True)
    source = MemorySource(
        config, {n: torch.zeros(s) for n, s in shapes.items()} | {n: t for n, t in whole.values.items() if n.startswith("mtp.")}
    )
    text = complaint(source)
    assert (
        "mtp.layers.0: the numbers of experts disagree: config.json 4, mlp.gate.weight 6, experts stored one by one 6" in text
    )
    assert "engines load no other" in text and "play no role" not in text


def test_a_quantized_checkpoint_is_recognized() -> None:
    source = tiny_source()
    name = f"{TEXT}layers.0.mlp.up_proj.weight"
    source.values[f"{name}_packed"] = source.values.pop(name)
    assert "quantized already" in complaint(source)


def test_an_unknown_model_type_is_told_with_the_known_ones() -> None:
    source = tiny_source()
    source.config["model_type"] = "llama"
    assert "model_type 'llama' is not known, known are qwen3_5, qwen3_5_text" in complaint(source)


def test_a_tower_may_be_left_out_but_not_halved() -> None:
    source = tiny_source()
    source.values = {n: t for n, t in source.values.items() if not n.startswith("model.visual.")}
    assert survey(source).vision == "missing" and not map_of(source).has_vision
    whole = tiny_source()
    del whole.values["model.visual.merger.norm.bias"]
    assert "1 of the 33 vision tensors" in complaint(whole)


def test_a_tied_head_that_is_stored_all_the_same_is_claimed() -> None:
    source = tiny_source(tied=True)
    source.values["lm_head.weight"] = source.values[f"{TEXT}embed_tokens.weight"].clone()
    map = map_of(source)
    assert map.tied and map.other("head").tensor == "lm_head.weight"


# From a config alone.


@pytest.mark.parametrize(
    ("name", "counts", "gigabytes"),
    [
        ("qwen3.5-9b", {"text": 427, "vision": 333, "mtp": 15}, 18.8),
        ("qwen3.5-35b-a3b", {"text": 693, "vision": 333, "mtp": 785}, 70.2),
    ],
)
def test_published_configs_give_the_published_numbers(name: str, counts: dict[str, int], gigabytes: float) -> None:
    source = sketch(published(name))
    part = {n: "mtp" if n.startswith("mtp.") else "vision" if n.startswith("model.visual.") else "text" for n in source.tensors}
    assert Counter(part.values()) == counts
    without_mtp = sum(e.nbytes for n, e in source.tensors.items() if part[n] != "mtp")
    assert round(without_mtp / 1e9, 1) == gigabytes
    assert {s.tensor for s in map_of(source).slots()} == set(source.tensors)
    with pytest.raises(CheckpointError, match="no weights"):
        source.read("lm_head.weight")


@pytest.mark.parametrize("name", ["qwen3.5-9b", "qwen3.5-35b-a3b"])
def test_the_sketch_has_the_names_and_shapes_of_the_transformers_classes(name: str) -> None:
    config = published(name)
    parsed = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(parsed)
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {n: e.shape for n, e in sketch(config).tensors.items() if not n.startswith("mtp.")} == expected


@pytest.mark.parametrize("name", ["qwen3.5-9b", "qwen3.5-35b-a3b"])
def test_the_text_only_sketch_too(name: str) -> None:
    config = published(name)["text_config"] | {"mtp_num_hidden_layers": 0}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {n: e.shape for n, e in sketch(config).tensors.items()} == expected


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("layout", ["conditional", "causal"])
def test_the_sketch_is_what_is_stored(moe: bool, layout: Any) -> None:
    config = tiny_config(moe=moe, layout=layout)
    assert {n: e.shape for n, e in sketch(config).tensors.items()} == tiny_shapes(config)
