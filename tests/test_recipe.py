"""Recipes: what a person may write, and what a person is told who writes it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.errors import RecipeError
from qwench.numerics.scheme import Scheme
from qwench.recipe import Calibration, bundled, byte_size, layer_range, load_recipe, parse_recipe, recipe_data

GOOD = """
name: mine
steps:
  - quantize:
      rules:
        - {roles: [attention.*], scheme: nvfp4, search: four-over-six}
        - {roles: [mlp.down], scheme: {kind: int, bits: 8, group: 64}, layers: 1..}
        - {roles: [mlp.up], scheme: keep}
  - export: {format: compressed-tensors, shard_size: 2GiB}
"""


def test_a_recipe_becomes_schemes() -> None:
    recipe = parse_recipe(GOOD, "here")
    assert recipe.quantize is not None
    first, second, third = recipe.quantize.rules
    assert first.resolved() == Scheme("nvfp4", 4, group=16, search="four-over-six")
    assert second.resolved() == Scheme("int", 8, group=64)
    assert third.resolved() is None
    assert recipe.export.shard_size == "2GiB"


@pytest.mark.parametrize("name", sorted(bundled()))
def test_every_bundled_recipe_loads_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.about) > 20


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("shard_size", "shard_sice", "did you mean 'shard_size'"),
        ("search: four-over-six", "serch: mse", "did you mean 'search'"),
        ("scheme: nvfp4", "scheme: nvpf4", "did you mean 'nvfp4'"),
        ("layers: 1..", "layers: one", "neither 'all'"),
        ("layers: 1..", "layers: 5..2", "ends before it begins"),
        ("2GiB", "2 gigs", "not of the form"),
        ("name: mine", "nam: mine", "did you mean 'name'"),
        ("format: compressed-tensors", "format: gptqq", "export.format"),
        ("  - export: {format: compressed-tensors, shard_size: 2GiB}", "", "ends with exactly one export"),
        ("name: mine", "name: [", "is not YAML"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_mend(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    with pytest.raises(RecipeError, match="here") as caught:
        parse_recipe(GOOD.replace(old, new), "here")
    assert expected in str(caught.value)


def test_float16_is_refused_with_the_reason() -> None:
    with pytest.raises(RecipeError, match="overflow"):
        parse_recipe(GOOD.replace("shard_size: 2GiB", "dtype: float16"), "here")


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'nvfp4a16'"):
        load_recipe("nvfp4a61")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml"):
        load_recipe(str(tmp_path / "absent.yaml"))


def test_layer_ranges() -> None:
    assert layer_range("all") == (0, None)
    assert layer_range("3") == (3, 3)
    assert layer_range("1..") == (1, None)
    assert layer_range("0..7") == (0, 7)
    assert layer_range("..7") == (0, 7)


def test_byte_sizes() -> None:
    assert byte_size("5GB") == 5_000_000_000
    assert byte_size("1.5MiB") == 1_572_864


CALIBRATED = """
name: mine
calibration: {text: org/name@abc, samples: 3, length: 17, thinking: off}
steps:
  - quantize: {method: gptq, rules: [{roles: [mlp.*], scheme: int4}]}
  - export: {}
"""


def test_calibration_is_read_and_a_bare_off_is_no_boolean() -> None:
    calibration = parse_recipe(CALIBRATED, "here").calibration
    assert calibration is not None
    assert (calibration.text, calibration.samples, calibration.length, calibration.thinking) == ("org/name@abc", 3, 17, "off")


def test_calibration_has_a_default_where_a_step_reads_rows_and_none_elsewhere() -> None:
    without = "\n".join(line for line in CALIBRATED.splitlines() if not line.startswith("calibration"))
    assert parse_recipe(without, "here").calibration == Calibration()
    assert parse_recipe(GOOD, "here").calibration is None
    assert recipe_data(parse_recipe(without, "here"))["calibration"]["samples"] == 128


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("samples: 3", "sampels: 3", "did you mean 'samples'"),
        ("samples: 3", "samples: 0", "calibration.samples"),
        ("length: 17", "length: 1", "calibration.length"),
        ("thinking: off", "thinking: on", "'filled' or 'off'"),
        ("method: gptq", "method: rtn", "no step reads it"),
        ("{text: org/name@abc, samples: 3, length: 17, thinking: off}", "null", "leave calibration out"),
    ],
)
def test_mistakes_in_calibration_are_named(old: str, new: str, expected: str) -> None:
    assert old in CALIBRATED
    with pytest.raises(RecipeError) as caught:
        parse_recipe(CALIBRATED.replace(old, new), "here")
    assert expected in str(caught.value)
