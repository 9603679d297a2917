"""What a run reads: the model and the donor that a person named, found, opened, and prepared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwench.checkpoint.folder import CONFIG_NAME, read_config
from qwench.checkpoint.hub import Located, locate
from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import StoredSource
from qwench.errors import PlanError
from qwench.models import sketch
from qwench.recipe import Recipe
from qwench.steps.materials.graft import open_donor
from qwench.steps.materials.prepare import prepared, release_sidecars


@dataclass(frozen=True)
class Material:
    """Checkpoints of a run.

    Attributes:
        located: where the model came from.
        origin: it, as it is stored.
        source: it, as the recipe's graft and layout change it: what plans, walks and writers read.
        donor, donor_located: where the recipe grafts.
    """

    recipe: Recipe
    located: Located
    origin: StoredSource
    source: StoredSource
    donor: StoredSource | None = None
    donor_located: Located | None = None

    @property
    def sidecars(self) -> dict[str, Path]:
        """Name -> path of the files that ride along with the tensors."""
        return release_sidecars(self.recipe, self.source, self.donor)


def open_material(recipe: Recipe, model: str, donor: str | None = None) -> Material:
    """Find and open everything; the hub's shards are fetched.

    Args:
        donor: a folder or a hub id, in place of the recipe's.

    Raises:
        CheckpointError: a model that is not there, or cannot be read.
        PlanError: a graft without a donor, a donor without a graft, or two that do not fit.
    """
    located = locate(model)
    origin = Checkpoint.open(located.path)
    name = _donor_of(recipe, donor)
    if name is None or recipe.graft is None:
        return Material(recipe, located, origin, prepared(recipe, origin, None))
    donor_located, opened = open_donor(name, recipe.graft.components)
    return Material(recipe, located, origin, prepared(recipe, origin, opened), opened, donor_located)


def material_for_plan(recipe: Recipe, model: str, donor: str | None = None) -> StoredSource:
    """The same checkpoint in names and shapes alone: no weight is fetched, and a config will do."""
    origin, name = shapes_of(model), _donor_of(recipe, donor)
    if name is None or recipe.graft is None:
        return prepared(recipe, origin, None)
    stored = Path(name).expanduser()
    described = stored.is_dir() and any(stored.glob("*.safetensors*"))
    return prepared(recipe, origin, open_donor(name, recipe.graft.components)[1] if described else shapes_of(name))


def shapes_of(model: str) -> StoredSource:
    """What names and shapes a model has: from its headers, or where only its config is at hand (a lone config.json, a hub id), as that describes it."""
    folder = locate(model, weights=False).path
    stored = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    broken = Path(model).exists() and any(folder.glob("*.safetensors.index.json"))
    if stored or broken or not (folder / CONFIG_NAME).is_file():
        return Checkpoint.open(folder)
    return sketch(read_config(folder))


def _donor_of(recipe: Recipe, given: str | None) -> str | None:
    """The donor that the command line or the recipe names. Raises PlanError where one is missing or out of place."""
    if given is not None and recipe.graft is None:
        raise PlanError(
            [
                (
                    f"recipe {recipe.name} has no graft step, and the donor {given} was given",
                    "leave --donor out, or add a graft step",
                )
            ]
        )
    name = given or (recipe.graft.donor if recipe.graft else None)
    if recipe.graft and name is None:
        parts = ", ".join(recipe.graft.components)
        raise PlanError([(f"recipe {recipe.name} grafts {parts} and names no donor", "give --donor FOLDER_OR_HUB_ID")])
    return name
