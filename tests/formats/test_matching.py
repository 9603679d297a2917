from __future__ import annotations

import pytest

from qwench.formats.matching import exact_pattern, matches, patterns, place


def hit(lines: list[str], module: str) -> bool:
    return any(matches(line, module) for line in lines)


def test_place_tells_trunk_from_mtp_and_forgets_expert_numbers() -> None:
    assert place("model.language_model.layers.3.mlp.experts.17.gate_proj") == place("model.layers.3.mlp.experts.4.gate_proj")
    assert place("mtp.layers.3.self_attn.q_proj") != place("model.layers.3.self_attn.q_proj")
    assert place("model.visual.blocks.3.attn.qkv").layer == -1


def test_patterns_match_every_name_of_theirs_and_no_other() -> None:
    wanted = [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in (3, 7, 11) for p in "qkv"]
    others = ["model.language_model.layers.3.self_attn.o_proj", "mtp.layers.3.self_attn.q_proj"]
    lines = patterns(wanted, others)
    assert len(lines) == 1
    assert all(hit(lines, m) for m in wanted)
    assert not any(hit(lines, m) for m in others)
    for name in (
        "model.layers.7.self_attn.k_proj",
        "language_model.model.layers.3.self_attn.qkv_proj",
        "layers.3.self_attn.q_proj",
    ):
        assert hit(lines, name)
    assert not hit(lines, "model.layers.3.self_attn.q_proj.extra")
    assert not hit(lines, "model.layers.3.self_attn.q_norm")


def test_layers_are_listed_where_only_some_are_wanted() -> None:
    wanted = [f"model.layers.{i}.mlp.down_proj" for i in (1, 2, 13)]
    lines = patterns(wanted, ["model.layers.3.mlp.down_proj", "model.layers.11.mlp.down_proj"])
    assert len(lines) == 1
    assert [i for i in range(20) if hit(lines, f"model.layers.{i}.mlp.down_proj")] == [1, 2, 13]


def test_a_name_that_begins_like_another_is_told_apart() -> None:
    lines = patterns(
        ["model.layers.1.mlp.gate"], ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.shared_expert.gate_proj"]
    )
    assert hit(lines, "model.layers.1.mlp.gate")
    for other in ("gate_proj", "gate_up_proj", "shared_expert.gate_proj"):
        assert not hit(lines, f"model.layers.1.mlp.{other}")


def test_fused_names_appear_only_where_all_members_are_wanted() -> None:
    both = patterns(["model.layers.0.linear_attn.in_proj_qkv", "model.layers.0.linear_attn.in_proj_z"], [])
    one = patterns(["model.layers.0.linear_attn.in_proj_qkv"], ["model.layers.0.linear_attn.in_proj_z"])
    assert hit(both, "model.layers.0.linear_attn.in_proj_qkvz")
    assert not hit(one, "model.layers.0.linear_attn.in_proj_qkvz")


@pytest.mark.parametrize("containers", [False, True])
def test_experts_are_a_line_each_layer_set(containers: bool) -> None:
    wanted = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in (0, 2) for e in range(256) for p in ("gate", "up", "down")]
    others = [f"model.layers.1.mlp.experts.{e}.{p}_proj" for e in range(256) for p in ("gate", "up", "down")]
    lines = patterns(wanted, others, containers)
    assert len(lines) == 1
    assert all(hit(lines, m) for m in wanted)
    assert not any(hit(lines, m) for m in others)
    assert hit(lines, "model.layers.2.mlp.experts") is containers
    assert not hit(lines, "model.layers.1.mlp.experts")


def test_experts_of_one_layer_that_differ_are_named_one_by_one() -> None:
    wanted = ["model.layers.0.mlp.experts.1.up_proj", "model.layers.2.mlp.experts.0.up_proj"]
    others = ["model.layers.0.mlp.experts.0.up_proj"]
    lines = patterns(wanted, others)
    assert all(hit(lines, m) for m in wanted)
    assert not any(hit(lines, m) for m in others)


@pytest.mark.parametrize(
    ("module", "also"),
    [
        ("lm_head", "language_model.lm_head"),
        ("model.visual.blocks.2.attn.qkv", "visual.blocks.2.attn.qkv"),
        ("model.language_model.layers.4.mlp.up_proj", "language_model.model.layers.4.mlp.up_proj"),
        ("mtp.fc", "mtp.fc"),
    ],
)
def test_exact_pattern_knows_every_engines_prefix(module: str, also: str) -> None:
    line = exact_pattern(module)
    assert matches(line, module)
    assert matches(line, also)
    assert not matches(line, module + "x")


def test_other_beginnings_can_be_asked_for() -> None:
    scopes = {"trunk": r"re:^stem\.layers\.", "mtp": r"re:^mtp\.layers\."}
    wanted = ["model.layers.1.mlp.down_proj", "model.layers.4.mlp.down_proj", "mtp.layers.0.mlp.down_proj"]
    lines = patterns(wanted, ["model.layers.2.mlp.down_proj"], scopes=scopes)
    assert lines == [r"re:^mtp\.layers\.\d+\.mlp\.(?:down_proj)$", r"re:^stem\.layers\.(?:1|4)\.mlp\.(?:down_proj)$"]
    assert exact_pattern("model.layers.7.mlp.down_proj", scopes).startswith(r"re:^stem\.layers\.7")
