"""Plans of GGUF releases: published sizes from a config alone, names of files, what overrides reach, and every complaint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwench.demo import checkpoint
from qwench.errors import CheckpointError, PlanError, RecipeError
from qwench.models import map_of, sketch
from qwench.recipe import parse_recipe
from qwench.run import plan_for
from qwench.steps.gguf.plan import GgufRelease, file_stem, make_gguf_plan
from qwench.steps.gguf.table import as_data
from tests.support.tiny import tiny_config, write_tiny

CONFIGS = Path(__file__).parents[2] / "data" / "configs"
PUBLISHED = {"BF16": 17.14, "Q8_0": 9.11, "Q6_K": 7.04, "Q4_K_M": 5.38}
"""GiB of a published release of the 9B with its MTP head."""


def planned(export: str, config: dict[str, Any] | None = None, more: str = "") -> GgufRelease:
    recipe = parse_recipe(f"name: t\n{more}\nsteps:\n  - export: {{format: gguf, {export}}}\n", "t")
    source = sketch(config or tiny_config())
    return make_gguf_plan(recipe, source, map_of(source), "somebody/Tiny-1B@main")


def test_published_sizes_from_the_config_of_the_9b(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((CONFIGS / "qwen3.5-9b.json").read_bytes())
    from qwench.recipe import load_recipe

    plan = plan_for(load_recipe("gguf"), str(tmp_path))
    assert isinstance(plan, GgufRelease)
    found = {f["file_type"]: f["bytes"] / 2**30 for f in as_data(plan)["files"] if f["content"] == "model"}
    assert found == {kind: pytest.approx(size, rel=0.01) for kind, size in PUBLISHED.items()}
    (tower,) = [f for f in as_data(plan)["files"] if f["content"] == "vision"]
    assert tower["bytes"] / 2**30 == pytest.approx(0.86, rel=0.01)
    assert any(".nextn." in t.tensor.name for t in plan.files[0].plan.tensors), "the published files hold the head"
    assert plan.working_memory < 0.6e9, "one tensor at a time"


def test_names_of_files() -> None:
    plan = planned("types: [Q8_0, IQ4_XS], content: [model, trunk-only, mtp-only], mmproj: F16")
    assert [f.name for f in plan.files] == [
        "Tiny-1B-Q8_0.gguf", "Tiny-1B-IQ4_XS.gguf", "Tiny-1B-trunk-Q8_0.gguf", "Tiny-1B-trunk-IQ4_XS.gguf",
        "mtp-Tiny-1B-Q8_0.gguf", "mtp-Tiny-1B-IQ4_XS.gguf", "mmproj-Tiny-1B-F16.gguf",
    ]  # fmt: skip
    assert file_stem("a b/ü$.") == "model" and file_stem("x/My Model!") == "My-Model"


def test_the_bytes_of_a_plan_are_those_of_the_files() -> None:
    """With a tokenizer at hand the header is counted too; test_gguf_run holds the files against it."""
    from qwench.recipe import load_recipe

    plan = plan_for(load_recipe("gguf"), str(checkpoint("dense")))
    assert isinstance(plan, GgufRelease)
    assert all(f.header > 0 for f in plan.files) and not any("tokenizer" in n for n in plan.notes)
    without = planned("types: [Q8_0]")
    assert all(f.header == 0 for f in without.files) and any("tokenizer" in n for n in without.notes)


def test_overrides_stay_out_of_unquantized_files_and_of_the_tower() -> None:
    plan = planned("types: [BF16, Q4_0], content: [model, trunk-only], overrides: [{roles: [mtp.*, delta.out], type: q8_0}]")
    kinds = {f.name: {t.tensor.role: t.type for t in f.plan.tensors} for f in plan.files}
    assert kinds["Tiny-1B-Q4_0.gguf"]["mtp.mlp.up"] == kinds["Tiny-1B-trunk-Q4_0.gguf"]["delta.out"] == "Q8_0"
    assert kinds["Tiny-1B-Q4_0.gguf"]["mlp.up"] == "Q4_0"
    assert set(kinds["Tiny-1B-BF16.gguf"].values()) == {"BF16", "F32"}


def test_absences_are_said() -> None:
    notes = planned("types: [Q8_0]", tiny_config(mtp=False, vision=False)).notes
    assert any("no MTP head, so no file can draft" in n for n in notes) and any(
        "no vision tower: no mmproj" in n for n in notes
    )


def test_fallbacks_are_said_by_file() -> None:
    assert any(n.startswith("Tiny-1B-Q4_K_M.gguf: ") and "Q5_0 and not Q4_K" in n for n in planned("types: [Q4_K_M]").notes)


def test_every_complaint_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        planned("types: [Q4_KM, Q8_O, Q6_K]", more="")
    said = [what for what, _ in caught.value.complaints]
    assert said == [
        "'Q4_KM' is no GGUF file type (did you mean 'Q4_K_M'?)",
        "'Q8_O' is no GGUF file type (did you mean 'Q8_0'?)",
    ]
    with pytest.raises(PlanError, match=r"no tensor of a file has a role like 'expert.\*', which overrides name"):
        planned("types: [Q8_0], overrides: [{roles: [expert.*], type: Q8_0}]")
    with pytest.raises(PlanError, match="no MTP head, so no draft file"):
        planned("types: [Q8_0], content: [mtp-only]", tiny_config(mtp=False))


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    config = tiny_config() | {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(PlanError, match=r"already quantized \(gptq\)"):
        planned("types: [Q8_0]", config)


def test_a_checkpoint_without_a_tokenizer_is_refused_before_any_work(tmp_path: Path) -> None:
    from qwench.recipe import load_recipe

    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        plan_for(load_recipe("gguf"), str(write_tiny(tmp_path / "m")))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("- export: {format: gguf, typs: [Q8_0]}", r"steps.0.export.typs: unknown key \(did you mean 'types'\?\)"),
        ("- export: {format: ggfu}", r"steps.0.export.format: 'ggfu' is none of 'gguf' \(did you mean 'gguf'\?\)"),
        ("- export: {format: gguf, shard_size: 5GB}", r"shard_size belongs to safetensors releases"),
        ("- export: {format: gguf, types: [Q8_0, Q8_0]}", r"Q8_0 is named twice"),
        ("- export: {format: gguf, content: [mtp]}", r"steps.0.export.content.0: 'mtp' is none of 'model', 'trunk-only' or 'mtp-only'"),
        (
            "- quantize: {rules: [{roles: [mlp.*], scheme: int4}]}\n- export: {format: gguf}",
            r"a gguf export chooses its own number formats, and quantize would not reach them",
        ),
        ("- export: {format: gguf}\ncalibration: {samples: 4}", r"calibration is given, and no step reads it"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_meant(steps: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        parse_recipe(f"name: t\nsteps:\n{steps}\n", "t")
    assert len(str(caught.value).splitlines()) == 3, "the place, the complaint, the mend, and nothing that follows from it"


def test_importance_reads_rows() -> None:
    recipe = parse_recipe("name: t\nsteps:\n- export: {format: gguf, importance: true}\n", "t")
    assert recipe.calibrated and recipe.calibration is not None
    assert not parse_recipe("name: t\nsteps:\n- export: {format: gguf}\n", "t").calibrated
    assert json.loads(json.dumps(recipe.model_dump(mode="json")))["steps"][0]["export"]["format"] == "gguf"
