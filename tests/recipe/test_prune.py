"""The prune step of a recipe: numbers that cannot be meant, the place of the step, and its vocabulary."""

from __future__ import annotations

from typing import get_args

import pytest

from qwench.errors import RecipeError
from qwench.methods import reap
from qwench.recipe import Prune, Recipe, parse_recipe
from qwench.recipe.prune import Criterion


def recipe_of(prune: str, others: str = "", export: str = "{format: compressed-tensors}") -> Recipe:
    return parse_recipe(f"name: t\nsteps:\n  - prune: {prune}\n{others}  - export: {export}\n", "t")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("{ratio: 0}", "0 of the experts would go"),
        ("{ratio: 1}", "1 of the experts would go"),
        ("{ratio: 1.5}", "1.5 of the experts would go"),
        ("{ratio: -0.25}", "-0.25 of the experts would go"),
        ("{experts: 0}", "greater than or equal to 1"),
        ("{}", "either ratio"),
        ("{ratio: 0.5, experts: 3}", "either ratio"),
        ("{ratio: 0.5, criterion: reaper}", "'reap', 'frequency'"),
        ("{ratoi: 0.5}", "did you mean 'ratio'"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_numbers(settings: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        recipe_of(settings)


@pytest.mark.parametrize(("ratio", "of", "left"), [(0.5, 256, 128), (0.25, 12, 9), (0.29, 100, 71), (0.3, 12, 9), (0.4, 5, 3)])
def test_whole_experts_go(ratio: float, of: int, left: int) -> None:
    assert Prune(ratio=ratio).kept(of) == left


def test_a_count_is_what_stays() -> None:
    assert Prune(experts=7).kept(256) == 7


def test_pruning_comes_before_everything_that_changes_numbers_and_reads_rows() -> None:
    recipe = recipe_of("{ratio: 0.5}")
    assert recipe.calibrated and recipe.calibration is not None
    assert recipe.prune is not None and recipe.prune.criterion == "reap"
    rtn = "  - quantize: {rules: [{roles: [expert.*], scheme: int4}]}\n"
    assert recipe_of("{ratio: 0.5}", rtn).quantize is not None
    with pytest.raises(RecipeError, match="in this order: graft, prune, smooth"):
        parse_recipe(f"name: t\nsteps:\n{rtn}  - prune: {{ratio: 0.5}}\n  - export: {{format: gptq}}\n", "t")


def test_gguf_files_are_made_of_a_pruned_release() -> None:
    with pytest.raises(RecipeError, match="prune first, into a release of its own"):
        recipe_of("{ratio: 0.5}", export="{format: gguf, types: [Q8_0]}")


def test_every_criterion_of_the_method_has_its_word() -> None:
    assert set(get_args(Criterion)) == {*get_args(reap.Criterion), "random"}
