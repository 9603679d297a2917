"""Loading played through: every stored tensor is placed where the engine would put it, and what is left over on either side is noted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qwench.checkpoint.source import TensorEntry
from qwench.formats import FORMATS, Container
from qwench.loading.parameters import parameters_of
from qwench.loading.parts import Built, Cast, Dropped, Into, Load, Model, Module, Parameter, Place, Refused, Stop
from qwench.loading.stored import KINDS

Scheming = Callable[[Module], Built | None]
"""How a module is built."""


def container_for(config: Mapping[str, Any]) -> Container | None:
    """The container that a checkpoint's config names; None where it is unquantized or the container is none of ours."""
    quantization = config.get("quantization_config")
    return FORMATS.get(quantization.get("quant_method", "compressed-tensors")) if quantization else None


def build(
    name: str, modules: list[Module], scheming: Scheming, container: Container | None, place: Place | None = None
) -> Model:
    """Build a model: decide for every module, allocate its parameters. A module that the engine refuses has none.

    Args:
        scheming: raises Stop where the engine stops.
    """
    schemes: dict[str, Built | None] = {}
    parameters: dict[str, Parameter] = {}
    refusals: list[Refused] = []
    for module in modules:
        try:
            schemes[module.asked] = scheme = scheming(module) if module.configured and module.kind in CONFIGURABLE else None
        except Stop as stop:
            refusals.append(Refused(module.asked, stop.why, stop.rule))
            continue
        parameters |= {p.name: p for p in parameters_of(module, container, scheme)}
    return Model(name, modules, schemes, parameters, place or _nowhere, refusals)


CONFIGURABLE = ("linear", "experts", "head")


def _nowhere(name: str, shape: tuple[int, ...]) -> Refused:
    return Refused(name, "there is no such module")


def load(model: Model, tensors: Iterable[TensorEntry]) -> Load:
    """Hand every stored tensor to a model, in order."""
    homes = {name: parameter.module for name, parameter in model.parameters.items()}
    made = Load(model.name, refusals=list(model.refusals), homes=homes, schemes=model.schemes)
    for entry in tensors:
        placed = model.place(entry.name, entry.shape)
        if isinstance(placed, Dropped):
            made.dropped[entry.name] = placed
        elif isinstance(placed, Refused):
            made.refusals.append(placed)
        else:
            _fill(model, made, entry, [placed] if isinstance(placed, Into) else placed)
    for parameter in model.parameters.values():
        if parameter.needed and (missing := parameter.missing):
            made.unfilled[parameter.name] = missing
    return made


def _fill(model: Model, made: Load, entry: TensorEntry, places: list[Into]) -> None:
    made.consumed.add(entry.name)
    for at in places:
        parameter = model.parameters[at.parameter]
        for key in at.keys:
            expected = parameter.parts[key]
            parameter.filled[key] = entry.name
            if not at.whole and expected is not None and not same_shape(entry.shape, expected):
                made.misfits[entry.name] = (entry.shape, expected)
                made.misfit_modules.add(parameter.module)
            if (kind := KINDS.get(entry.dtype)) and parameter.holds in KINDS.values() and kind != parameter.holds:
                made.casts[entry.name] = Cast(kind, parameter.holds, parameter.module)


def same_shape(stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a tensor fits; one number may come with or without a dimension."""
    return stored == expected or (stored in ((), (1,)) and expected in ((), (1,)))
