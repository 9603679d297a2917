"""The step `prune` before the walk: how many experts stay, what the checkpoint looks like then, and every reason why it cannot be.

Which experts stay is found out by the walk (see `changes.pruning`). Their number is enough for a plan.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwench.checkpoint.source import StoredSource, TensorSource
from qwench.models import map_of
from qwench.models.geometry import Complaint, Geometry, read_geometry
from qwench.models.map import ModelMap
from qwench.models.pruned import Pruned
from qwench.recipe import Prune


def with_fewer_experts(settings: Prune, source: StoredSource, map: ModelMap) -> tuple[StoredSource, ModelMap, list[Complaint]]:
    """The checkpoint without the experts that go, its map, and complaints; both as they were where there are any."""
    complaints = list(_complaints(settings, read_geometry(source.config)))
    if complaints:
        return source, map, complaints
    target = Pruned(source, map, settings.kept(read_geometry(source.config).experts))
    return target, map_of(target), []


def _complaints(settings: Prune, g: Geometry) -> Iterator[Complaint]:
    if not g.moe:
        yield (
            "prune leaves experts out, and this model is dense: it has none",
            "take the step out, or name a mixture of experts",
        )
        return
    kept = settings.kept(g.experts)
    said = f"prune keeps {kept} of {g.experts} experts ({_words(settings)})"
    if kept >= g.experts:
        yield f"{said}: none would go", f"keep fewer than {g.experts}, and at least {g.chosen}"
    elif kept < g.chosen:
        yield f"{said}, and the router sends every token to {g.chosen}", f"keep at least {g.chosen}"


def _words(settings: Prune) -> str:
    return f"experts: {settings.experts}" if settings.experts is not None else f"ratio: {settings.ratio:g}"


def prune_notes(source: TensorSource) -> list[str]:
    """What a person should know of a plan on this checkpoint."""
    if not isinstance(source, Pruned):
        return []
    return [f"{source.before - source.count} of {source.before} experts go in every layer; which ones, calibration says"]
