"""Every container of the table, from a recipe to a release that is read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import TORCH_DTYPE
from qwench.display import Report
from qwench.errors import PlanError
from qwench.formats import FORMATS
from qwench.formats.release import Release, open_source
from qwench.methods.rtn import round_fused
from qwench.models import map_of
from qwench.numerics import decode
from qwench.recipe import Recipe, parse_recipe
from qwench.run import run_recipe
from qwench.steps.materials.prepare import prepared
from qwench.steps.planning.plan import Plan, make_plan
from tests.support.tiny import write_tiny

QUIET = Report("test", "bytes", None)
INTEGERS = """
name: t
steps:
  - quantize:
      METHOD
      rules:
        - {roles: [attention.*, shared.*], scheme: {kind: int, bits: 8, group: 64}}
        - {roles: [delta.qkv, delta.z, delta.out, mlp.*, expert.*], scheme: {kind: int, bits: 4, group: 32, full_range: true}}
        - {roles: [mtp.attention.*, mtp.mlp.*, mtp.expert.*], scheme: {kind: int, bits: 4}}
        - {roles: [mlp.*, expert.*], scheme: keep, layers: "2"}
  - export: {format: FORMAT}
"""


def recipe_of(format: str, method: str = "method: rtn") -> Recipe:
    """Only the rules whose roles a model has are kept by `plan_of`."""
    return parse_recipe(INTEGERS.replace("FORMAT", format).replace("METHOD", method), "t")


def for_model(recipe: Recipe, moe: bool) -> Recipe:
    """The recipe without the roles that the other kind of model has."""
    data = recipe.model_dump(mode="json", exclude_none=True)
    other = ("mlp.", "mtp.mlp.") if moe else ("shared.", "expert.", "mtp.expert.")
    for rule in data["steps"][0]["quantize"]["rules"]:
        rule["roles"] = [role for role in rule["roles"] if not role.startswith(other)]
    return Recipe.model_validate(data)


def plan_of(recipe: Recipe, folder: Path, moe: bool) -> Plan:
    made = for_model(recipe, moe)
    source = prepared(made, Checkpoint.open(folder), None)
    return make_plan(made, source, map_of(source))


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    moe = request.param == "moe"
    return write_tiny(tmp_path_factory.mktemp("table") / request.param, moe=moe), moe


@pytest.mark.parametrize("format", FORMATS)
def test_a_release_in_every_container_is_read_back_to_the_rounding(
    model: tuple[Path, bool], format: str, tmp_path: Path
) -> None:
    folder, moe = model
    recipe = for_model(recipe_of(format), moe)
    run_recipe(recipe, str(folder), tmp_path / "out", 1, QUIET)
    plan = plan_of(recipe_of(format), folder, moe)
    release, source = open_source(tmp_path / "out"), plan.source
    assert isinstance(release, Release)
    assert {w.module for w in release.stored.values()} == set(plan.schemes)
    for job in plan.jobs:
        if job.quantized:
            weights = [source.read(slot.tensor, slot.part) for slot in job.quantized.slots]
            for slot, expected in zip(job.quantized.slots, round_fused(weights, job.quantized.scheme), strict=True):
                assert torch.equal(release.read(f"{slot.module}.weight"), decode(expected)), slot.module
        elif job.copied:
            assert torch.equal(release.read(job.copied.name), source.read(job.copied.name))
    release.close()


@pytest.mark.parametrize("format", FORMATS)
def test_the_config_of_a_release_names_its_container(model: tuple[Path, bool], format: str, tmp_path: Path) -> None:
    folder, moe = model
    run_recipe(for_model(recipe_of(format), moe), str(folder), tmp_path / "out", 1, QUIET)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == format == FORMATS[format].METHOD
    beside = tmp_path / "out" / "quantize_config.json"
    assert beside.exists() == (format == "gptq")
    assert format != "gptq" or json.loads(beside.read_text()) == config


@pytest.mark.parametrize("format", FORMATS)
def test_a_plan_lists_what_the_container_writes(model: tuple[Path, bool], format: str) -> None:
    folder, moe = model
    plan = plan_of(recipe_of(format), folder, moe)
    listed = {spec.name: spec for file in plan.files for spec in file.tensors}
    for job in plan.jobs:
        for slot in job.quantized.slots if job.quantized else ():
            assert job.quantized
            specs = FORMATS[format].layout(slot.module, slot.shape, job.quantized.scheme, "BF16")
            assert [listed[spec.name] for spec in specs] == specs
            assert all(spec.dtype in TORCH_DTYPE for spec in specs)


def complaints_of(recipe: Recipe, folder: Path, moe: bool) -> list[str]:
    with pytest.raises(PlanError) as caught:
        plan_of(recipe, folder, moe)
    assert all(mend for _, mend in caught.value.complaints)
    return [what for what, _ in caught.value.complaints]


@pytest.mark.parametrize(
    ("format", "words"), [("compressed-tensors", "lost the order"), ("auto-round", "no place for the order")]
)
def test_dynamic_order_is_refused_where_it_would_not_be_read(model: tuple[Path, bool], format: str, words: str) -> None:
    method = "method: gptq\n      gptq: {order: dynamic}"
    assert any(words in what for what in complaints_of(recipe_of(format, method), *model))


def test_dynamic_order_makes_schemes_with_groups_ordered_and_is_remarked_upon(model: tuple[Path, bool]) -> None:
    plan = plan_of(recipe_of("gptq", "method: gptq\n      gptq: {order: dynamic}"), *model)
    assert {scheme.ordered for scheme in plan.schemes.values() if scheme.group} == {True}
    assert {scheme.ordered for scheme in plan.schemes.values() if not scheme.group} == {False}
    assert any("desc_act" in note for note in plan.notes)
    still = plan_of(recipe_of("gptq", "method: gptq"), *model)
    assert not any(scheme.ordered for scheme in still.schemes.values()) and not still.notes


@pytest.mark.parametrize("format", ["gptq", "auto-round"])
def test_numbers_that_a_container_lacks_are_refused(model: tuple[Path, bool], format: str) -> None:
    folder, moe = model
    text = f"name: t\nsteps:\n  - quantize: {{rules: [{{roles: [attention.*], scheme: nvfp4}}, {{roles: [delta.out], scheme: {{kind: int, bits: 4, group: 32, symmetric: false}}}}]}}\n  - export: {{format: {format}}}\n"
    found = complaints_of(parse_recipe(text, "t"), folder, moe)
    assert any(f"{format} holds integers, not nvfp4" in what for what in found)
    assert any(f"{format} holds symmetric integers" in what for what in found)
