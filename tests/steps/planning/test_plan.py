"""Plans: the published numbers from the published configs, and every complaint before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import PlanError
from qwench.models import map_of, sketch
from qwench.recipe import Recipe, load_recipe, parse_recipe
from qwench.steps.planning.plan import Plan, make_plan
from qwench.steps.planning.table import as_data
from tests.support.tiny import write_tiny

CONFIGS = Path(__file__).parents[2] / "data" / "configs"


def config(name: str, **text: object) -> dict[str, object]:
    found: dict[str, object] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    found["text_config"] = found["text_config"] | text  # type: ignore[operator]
    return found


def recipe_of(rules: str) -> Recipe:
    return parse_recipe(
        f"name: t\nsteps:\n  - quantize: {{rules: [{rules}]}}\n  - export: {{format: compressed-tensors}}\n", "t"
    )


def plan_of(recipe: Recipe, folder: Path) -> Plan:
    source = Checkpoint.open(folder)
    return make_plan(recipe, source, map_of(source))


def complaints_of(recipe: Recipe, folder: Path) -> list[str]:
    with pytest.raises(PlanError) as caught:
        plan_of(recipe, folder)
    assert all(mend for _, mend in caught.value.complaints), "every complaint says how to mend it"
    return [what for what, _ in caught.value.complaints]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("plan") / "dense")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("plan") / "moe", moe=True)


def test_release_3_from_the_published_config() -> None:
    """Release 3: 128 tensors quantized, 632 kept in BF16; 18.8 GB becomes 11.2 GB. Its base had lost the MTP head."""
    source = sketch(config("qwen3.5-9b", mtp_num_hidden_layers=0))
    plan = make_plan(load_recipe("nvfp4a16"), source, map_of(source))
    assert (plan.quantized_tensors, plan.kept_tensors) == (128, 632)
    assert sum(t.nbytes for t in source.tensors.values()) / 1e9 == pytest.approx(18.8, abs=0.05)
    assert plan.nbytes / 1e9 == pytest.approx(11.2, abs=0.05)
    assert plan.bits_per_weight == pytest.approx(4.5, abs=0.001)


def test_the_35b_is_planned_in_full_and_its_memory_follows_one_set() -> None:
    source = sketch(config("qwen3.5-35b-a3b"))
    plan = make_plan(load_recipe("nvfp4a16"), source, map_of(source))
    # 10 attention layers x 4, 40 layers x (256 experts + 1 shared) x 3
    assert plan.quantized_tensors == 10 * 4 + 40 * 257 * 3
    assert plan.working_memory < 200 * 2**20


def test_the_order_of_files_and_bytes_adds_up(moe: Path) -> None:
    recipe = recipe_of("{roles: [expert.*], scheme: nvfp4}")
    plan = plan_of(recipe, moe)
    names = [t.name for f in plan.files for t in f.tensors]
    assert len(names) == len(set(names))
    assert sum(f.nbytes for f in plan.files) >= plan.nbytes
    assert as_data(plan)["bytes"] == plan.nbytes == sum(row["bytes"] for row in as_data(plan)["precision"])
    kept = {e.name for e in plan.source.tensors.values()} - set(names)
    assert kept and all(".mlp.experts." in name and not name.startswith("mtp.") for name in kept)


def test_small_shards_hold_all_tensors_once(dense: Path) -> None:
    recipe = parse_recipe(
        "name: t\nsteps:\n  - quantize: {rules: [{roles: [mlp.*], scheme: int4}]}\n  - export: {shard_size: 100kB}\n".replace(
            "kB", "000B"
        ),
        "t",
    )
    plan = plan_of(recipe, dense)
    assert len(plan.files) > 3
    assert plan.files[0].name == f"model-00001-of-{len(plan.files):05d}.safetensors"


@pytest.mark.parametrize(
    ("rules", "fused"),
    [
        ("{roles: [attention.q], scheme: int4}", "qkv_proj"),
        ("{roles: [mlp.gate], scheme: nvfp4}", "gate_up_proj"),
        ("{roles: [mlp.*], scheme: nvfp4}, {roles: [mlp.up], scheme: int8}", "gate_up_proj"),
        ("{roles: [delta.qkv], scheme: nvfp4}", "in_proj_qkvz"),
        ("{roles: [mtp.mlp.up], scheme: int4}", "gate_up_proj"),
    ],
)
def test_a_split_fused_set_is_refused_with_its_name(dense: Path, rules: str, fused: str) -> None:
    assert any(f"engines fuse {fused}" in what for what in complaints_of(recipe_of(rules), dense))


def test_experts_share_one_scheme(moe: Path) -> None:
    found = complaints_of(recipe_of("{roles: [expert.*], scheme: int4}, {roles: [expert.down], scheme: int8}"), moe)
    assert any("experts" in what for what in found)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("{roles: [attention.qq], scheme: int4}", "did you mean 'attention.q'"),
        ("{roles: [expert.*], scheme: int4}", "names no weight of this qwen3_5 model"),
        ("{roles: [delta.a], scheme: int4}", "never quantized"),
        ("{roles: [delta.conv], scheme: int4}", "not the matrix of a linear layer"),
        ("{roles: [mlp.*], scheme: {kind: int, bits: 4, group: 104}}", "does not divide rows"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(dense: Path, rules: str, expected: str) -> None:
    assert any(expected in what for what in complaints_of(recipe_of(rules), dense))


def test_all_complaints_come_at_once(dense: Path) -> None:
    found = complaints_of(recipe_of("{roles: [attention.qq, router], scheme: int4}, {roles: [mlp.gate], scheme: int4}"), dense)
    assert len(found) >= 3


def test_globs_do_not_reach_into_the_mtp_head_or_the_tower(dense: Path) -> None:
    plan = plan_of(recipe_of("{roles: ['*'], scheme: int4, layers: 1..}"), dense)
    assert plan.schemes
    assert not any(name.startswith("mtp.") or "visual" in name or ".layers.0." in name for name in plan.schemes)


def test_a_kept_exception_takes_a_role_out(dense: Path) -> None:
    plan = plan_of(recipe_of("{roles: [attention.*], scheme: nvfp4}, {roles: [attention.o], scheme: keep}"), dense)
    assert plan.schemes
    assert not any(name.endswith("o_proj") for name in plan.schemes)


def test_a_quantized_or_float16_source_is_refused(dense: Path) -> None:
    source = Checkpoint.open(dense)
    source.config["quantization_config"] = {"quant_method": "gptq"}
    with pytest.raises(PlanError, match="already quantized"):
        make_plan(load_recipe("int4"), source, map_of(source))


def test_the_fingerprint_changes_with_recipe_and_source(dense: Path, moe: Path) -> None:
    prints = [plan_of(load_recipe(r), f).fingerprint for r in ("int4", "nvfp4a16") for f in (dense, moe)]
    assert len(set(prints)) == 4
    assert plan_of(load_recipe("int4"), dense).fingerprint == prints[0]
