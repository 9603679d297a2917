"""What a release is made from: the checkpoint as the recipe's first words change it, before any number does.

    source -> graft (components of a donor) -> layout (names, config, what stays behind) -> plan

Nothing is written for it: the result is a view (see `checkpoint.views`), which plans, walks and writers read as they read a checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from qwench.checkpoint.sidecars import PROCESSORS, sidecars_of
from qwench.checkpoint.source import StoredSource
from qwench.checkpoint.views import Place, View
from qwench.errors import PlanError
from qwench.models import map_of
from qwench.models.components import component_names
from qwench.models.layout import MTP_LAYERS, config_with_mtp, is_text_only, text_only_config, text_only_name
from qwench.recipe import Export, Recipe
from qwench.steps.materials.graft import grafted


def prepared(recipe: Recipe, source: StoredSource, donor: StoredSource | None) -> StoredSource:
    """The checkpoint that a recipe's jobs read: the source itself where the recipe changes nothing of its outline.

    Args:
        donor: where the recipe grafts; see `graft.open_donor`.

    Raises:
        PlanError: a graft without a donor, a donor without a graft, or two that do not fit.
    """
    if recipe.graft and donor is None:
        parts = ", ".join(recipe.graft.components)
        raise PlanError([(f"recipe {recipe.name} grafts {parts} and names no donor", "give --donor FOLDER_OR_HUB_ID")])
    if donor is not None and not recipe.graft:
        raise PlanError(
            [(f"recipe {recipe.name} has no graft step, and a donor was given", "leave --donor out, or add a graft step")]
        )
    if recipe.graft and donor is not None:
        source = grafted(source, donor, recipe.graft)
    if recipe.gguf:
        return source
    laid = laid_out(source, recipe.export)
    return one_by_one(laid) if recipe.export.experts_single else laid


def laid_out(source: StoredSource, export: Export) -> StoredSource:
    """The source in the layout that the export asks for; itself where that changes nothing."""
    dropped = {name for component in export.drop for name in component_names(source.tensors, component)}
    relaid = export.layout == "text" and not is_text_only(source.config)
    headless = "mtp" in export.drop and (dropped or MTP_LAYERS in str(source.config))
    if not (dropped or relaid or headless):
        return source
    config = text_only_config(source.config) if relaid else source.config
    if "mtp" in export.drop:
        config = config_with_mtp(config, 0)
    names = {name: text_only_name(name) if relaid else name for name in source.tensors if name not in dropped}
    return View(source.folder, config, {new: Place(source, old) for old, new in names.items() if new is not None})


def one_by_one(source: StoredSource) -> StoredSource:
    """The source with every expert's matrices as tensors of their own; itself where they are that already, or where there are none."""
    slots = [slot for slot in map_of(source).slots() if slot.expert is not None and slot.part]
    if not slots:
        return source
    stacked: dict[str, dict[str, Place]] = defaultdict(dict)
    for slot in slots:
        stacked[slot.tensor][f"{slot.module}.weight"] = Place(source, slot.tensor, slot.part)
    places: dict[str, Place] = {}
    for name in source.tensors:
        places |= stacked.get(name) or {name: Place(source, name)}
    return View(source.folder, source.config, places)


def release_sidecars(recipe: Recipe, prepared: StoredSource, donor: StoredSource | None) -> dict[str, Path]:
    """Name -> path of the files that ride along: processors go where the tower goes, and come from the donor where it does and the source has none."""
    found = sidecars_of(prepared.folder)
    if recipe.graft and donor is not None and "vision" in recipe.graft.components:
        found = {name: path for name, path in sidecars_of(donor.folder).items() if name in PROCESSORS} | found
    if not recipe.gguf and recipe.export.layout == "text":
        found = {name: path for name, path in found.items() if name not in PROCESSORS}
    return found
