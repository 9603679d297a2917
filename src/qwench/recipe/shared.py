"""A recipe as others may see it: where files of the maker's machine lay is nobody else's business, and of no use to anybody.

Of a local file or folder only the name is published, with a hash beside it (see `qwench.steps.provenance`); who makes the release again says where his copy lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from qwench.recipe.recipe import Recipe, recipe_data

CALIBRATION, IMPORTANCE, DONOR = "calibration", "importance", "donor"
"""What a recipe may name by its path: the text that rows are taken from, the file of importances, the checkpoint that parts are grafted from."""
CARRIED = "carried"


def local_inputs(recipe: Recipe) -> dict[str, Path]:
    """Files and folders of this machine that a recipe names; what reads like one and is on the hub is not among them."""
    text, donor = recipe.calibration and recipe.calibration.text, recipe.graft and recipe.graft.donor
    importance = recipe.gguf and recipe.gguf.importance
    named = {CALIBRATION: text if text != CARRIED else None, IMPORTANCE: importance, DONOR: donor}
    paths = {what: Path(said).expanduser() for what, said in named.items() if isinstance(said, str)}
    return {what: path for what, path in paths.items() if path.exists()}


def public_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with all defaults, and names in place of paths."""
    return with_inputs(recipe_data(recipe), {what: path.resolve().name for what, path in local_inputs(recipe).items()})


def with_inputs(data: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """A recipe's data with other files; `inputs` by the keys of `local_inputs`."""
    changed = deepcopy(dict(data))
    steps = {name: settings for step in changed["steps"] for name, settings in step.items()}
    places = {CALIBRATION: (changed.get("calibration"), "text"), IMPORTANCE: (steps.get("export"), "importance")}
    places[DONOR] = (steps.get("graft"), "donor")
    for what, said in inputs.items():
        part, key = places[what]
        if part is not None:
            part[key] = said
    return changed
