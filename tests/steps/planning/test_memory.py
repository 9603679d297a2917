"""What a plan says of memory: that of the worst layer, whatever the depth; and the constants that it shares with what it speaks of."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from qwench.models import map_of, sketch
from qwench.recipe import Recipe, load_recipe, parse_recipe
from qwench.steps import calibrate
from qwench.steps.changes import judges, repair, tuning
from qwench.steps.materials.prepare import prepared
from qwench.steps.planning import memory
from qwench.steps.planning.plan import Plan, make_plan

PUBLISHED = Path(__file__).parents[2] / "data" / "configs" / "qwen3.5-35b-a3b.json"
GIB = 2**30


def plan_of(recipe: Recipe, layers: int = 4) -> Plan:
    config = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    text = config["text_config"]
    text |= {"num_hidden_layers": layers, "layer_types": text["layer_types"][:layers]}
    source = prepared(recipe, sketch(config), None)
    return make_plan(recipe, source, map_of(source))


@pytest.mark.parametrize("name", ["int4"])
def test_data_free_recipes_of_the_35b_fit_in_4_gib_and_depth_takes_nothing(name: str) -> None:
    """Peers load the checkpoint whole, 67 GiB and more."""
    recipe = load_recipe(name)
    full, quarter = plan_of(recipe, 40), plan_of(recipe, 10)
    assert full.working_memory == quarter.working_memory < 0.1 * GIB


@pytest.mark.parametrize("name", ["reap50-autoround-int4-mtp", "nvfp4-w4a4"])
def test_calibrated_recipes_hold_one_layer_and_depth_takes_nothing(name: str) -> None:
    recipe = load_recipe(name)
    full, quarter = plan_of(recipe, 12), plan_of(recipe, 4)
    layer = 4 * 256 * 3 * 512 * 2048
    assert full.working_memory == quarter.working_memory
    assert layer < full.working_memory < 5 * layer


def recipe_of(steps: str, rows: int = 64, length: int = 512) -> Recipe:
    text = f"name: t\ncalibration: {{samples: {rows}, length: {length}}}\nsteps:\n{steps}  - export: {{format: compressed-tensors}}\n"
    return parse_recipe(text, "t")


ROUND = "  - quantize: {method: METHOD, rules: [{roles: [expert.*, attention.*], scheme: int4}]}\n"


def test_each_method_adds_what_it_holds() -> None:
    plain = plan_of(recipe_of("  - prune: {ratio: 0.5}\n")).working_memory
    gptq, tuned = (plan_of(recipe_of(ROUND.replace("METHOD", method))).working_memory for method in ("gptq", "autoround"))
    weights = 256 * 3 * 512 * 2048
    assert plain < gptq < tuned and tuned > 4 * weights + memory.TUNED * weights
    pruned = plan_of(recipe_of("  - prune: {ratio: 0.5}\n" + ROUND.replace("METHOD", "autoround"))).working_memory
    assert pruned < 0.62 * tuned, "half of the experts are tuned, and the whole layer is only read"


def test_longer_rows_take_more_and_more_of_them_do_not() -> None:
    small, long, many = (
        plan_of(recipe_of("  - prune: {ratio: 0.5}\n", rows, length)).working_memory
        for rows, length in ((64, 512), (64, 4096), (640, 512))
    )
    assert small == many < long


def test_constants_are_those_of_the_code_that_they_speak_of() -> None:
    assert memory.BACKWARD == tuning.ACTIVATIONS
    assert memory.SEARCHED == judges.SEARCH_TOKENS
    assert memory.ADDED == repair.BYTES
    assert inspect.signature(calibrate.calibrate).parameters["batch"].default == memory.BATCH
