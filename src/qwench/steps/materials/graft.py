"""The step `graft`: put back a component that a checkpoint lost, bit for bit from a donor.

    trunk      a fine-tune without its MTP head; often only `mtp_num_hidden_layers: 1` in its config tells that there was one
    donor      the base that it was tuned from: only the shards that hold the component are fetched and read

Shapes decide whether the result is a network at all: a donor of another shape is refused with the numbers. Everything else that can differ is stated: settings that change what the
same weights compute, tokens with other ids, how far the trunk's embedding and head have moved away from the donor's, which are the ones that the donor's head learned to read and to write.
Whether the head still fits is not to be known from any of it: acceptance is measured (see `gate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwench.checkpoint.folder import INDEX_NAME, Wanted, read_index
from qwench.checkpoint.hub import Located, locate
from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import StoredSource
from qwench.checkpoint.views import View, of
from qwench.errors import CheckpointError, PlanError
from qwench.models.components import NAMES, SETTINGS, component_complaints, component_names, differing_numbers
from qwench.models.geometry import Complaint, text_config
from qwench.models.layout import MTP_LAYERS, OF_IMAGES, PREFIXES, config_with_mtp, is_text_only
from qwench.recipe import Graft

NO_COMPONENT = "name a donor that has it; fine-tunes often lost it, their base has it"


def wanted(components: Sequence[str]) -> Wanted:
    """Which tensors a donor is asked for."""
    prefixes = tuple(PREFIXES[component] for component in components)
    return lambda name: name.startswith(prefixes)


def open_donor(donor: str, components: Sequence[str]) -> tuple[Located, Checkpoint]:
    """A donor on this machine. From the hub come only the shards that hold the components; of a folder that lacks others, only these are looked at.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    _check_index(donor, locate(donor, weights=False).path / INDEX_NAME, components)
    located = locate(donor, wanted=wanted(components))
    try:
        return located, Checkpoint.open(located.path)
    except CheckpointError:  # a part of it, perhaps: then what is asked for must be whole
        return located, Checkpoint.open(located.path, wanted(components))


def _check_index(donor: str, index: Path, components: Sequence[str]) -> None:
    """Raise CheckpointError, before a shard is fetched, where the donor's index shows that it lacks a component."""
    names = read_index(index) if index.is_file() else {}
    lacking = [NAMES[component] for component in components if names and not component_names(names, component)]
    if lacking:
        raise CheckpointError(
            f"the donor {donor} has no {' and no '.join(lacking)}: {index} names none of its tensors", NO_COMPONENT
        )


def grafted(trunk: StoredSource, donor: StoredSource, settings: Graft) -> View:
    """The trunk with the donor's components. Raises PlanError with every reason why they cannot be put together."""
    complaints = [c for component in settings.components for c in _complaints(component, trunk, donor, settings.replace)]
    if complaints:
        raise PlanError(complaints)
    names = [name for component in settings.components for name in component_names(donor.tensors, component)]
    left = [name for component in settings.components for name in component_names(trunk.tensors, component)]
    own = [name for name in trunk.tensors if name not in set(left)]
    parts = " and ".join(NAMES[component] for component in settings.components)
    notes = [f"{parts} grafted from {donor.folder}: {len(names)} tensors", *_settings_notes(trunk, donor)]
    if any(trunk.tensors[name].file for name in left):
        notes.append(f"{len(left)} tensors of the source were replaced by the donor's")
    return View(trunk.folder, _config(trunk, donor, settings), {**of(trunk, own), **of(donor, names)}, notes)


def _complaints(component: str, trunk: StoredSource, donor: StoredSource, replace: bool) -> Iterator[Complaint]:
    yield from _place_complaints(component, trunk, replace)
    what = NAMES[component]
    if not component_names(donor.tensors, component):
        yield (
            f"the donor {donor.folder} has no {what}: none of its {len(donor.tensors)} tensors begins with {PREFIXES[component]}",
            NO_COMPONENT,
        )
        return
    differing = list(_shape_complaints(component, trunk, donor))
    yield from differing
    if not differing:
        yield from component_complaints(component, _config_for(component, trunk, donor), donor)


def _place_complaints(component: str, trunk: StoredSource, replace: bool) -> Iterator[Complaint]:
    """Whether there is room for it. Tensors without a file are those that a lone config describes: nobody knows whether they are stored."""
    what = NAMES[component]
    if component == "vision" and is_text_only(trunk.config):
        yield (
            f"{trunk.folder} is a text-only causal LM: its classes take no vision tower",
            "graft into a checkpoint of conditional generation",
        )
    stored = [name for name in component_names(trunk.tensors, component) if trunk.tensors[name].file]
    if stored and not replace:
        broken = list(component_complaints(component, trunk.config, trunk))
        said = broken[0][0] if broken else f"{trunk.folder} has a whole {what}: {len(stored)} tensors"
        yield said, "leave the graft out, or say replace: true to take the donor's instead"


def _shape_complaints(component: str, trunk: StoredSource, donor: StoredSource) -> Iterator[Complaint]:
    """The numbers that do not fit, before the tensors that they shape."""
    mend = "take a donor of the same shape: the base that this checkpoint was tuned from"
    if component == "vision":
        width, hidden = _tower(donor).get("out_hidden_size"), text_config(trunk.config).get("hidden_size")
        if width != hidden:
            yield f"the donor's tower puts out {width} channels, the trunk reads {hidden}", mend
        return
    kinds = ["a mixture of experts" if "moe" in str(s.config.get("model_type")) else "dense" for s in (donor, trunk)]
    if kinds[0] != kinds[1]:
        yield f"the donor is {kinds[0]}, the trunk {kinds[1]}", mend
        return
    for key, (ours, theirs) in differing_numbers(trunk.config, donor.config).items():
        yield f"{key}: the donor has {theirs}, the trunk {ours}", mend


def _config_for(component: str, trunk: StoredSource, donor: StoredSource) -> dict[str, Any]:
    """The trunk's config as it is once the component is there."""
    if component == "mtp":
        return config_with_mtp(trunk.config, int(text_config(donor.config).get(MTP_LAYERS) or 1))
    return {**trunk.config, **{key: donor.config[key] for key in OF_IMAGES if key in donor.config}}


def _config(trunk: StoredSource, donor: StoredSource, settings: Graft) -> dict[str, Any]:
    config: dict[str, Any] = dict(trunk.config)
    if "vision" in settings.components:
        config |= {key: donor.config[key] for key in OF_IMAGES if key in donor.config}
    if "mtp" in settings.components:
        config = config_with_mtp(config, int(text_config(donor.config).get(MTP_LAYERS) or 1))
    return config


def _tower(donor: StoredSource) -> dict[str, Any]:
    vision = donor.config.get("vision_config")
    if not isinstance(vision, dict):
        raise CheckpointError(f"config.json of the donor {donor.folder} has no vision_config", "take a donor that has a tower")
    return vision


def _settings_notes(trunk: StoredSource, donor: StoredSource) -> Iterator[str]:
    """What the graft computes with the trunk's settings where the donor had others."""
    for key, (ours, theirs) in differing_numbers(trunk.config, donor.config, (*SETTINGS, "vocab_size")).items():
        yield f"config.json: {key} is {ours} here, and was {theirs} where the graft was trained"
