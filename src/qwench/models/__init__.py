"""Models: roles, names and shapes of a network's weights, and running it block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwench.checkpoint.source import TensorSource
from qwench.errors import CheckpointError
from qwench.models import qwen3_5
from qwench.models.map import Block, Fold, ModelMap, Slot
from qwench.models.qwen3_5 import Sketch, Survey

__all__ = ["ARCHITECTURES", "Architecture", "Block", "Fold", "ModelMap", "Slot", "Survey", "map_of", "sketch", "survey"]


@dataclass(frozen=True)
class Architecture:
    """How the checkpoints of one model type are understood.

    Attributes:
        survey: maps a checkpoint and complains.
        sketch: the weightless checkpoint that a config describes.
    """

    survey: Callable[[TensorSource], Survey]
    sketch: Callable[[dict[str, Any]], Sketch]


QWEN3_5 = Architecture(qwen3_5.survey, qwen3_5.sketch)

ARCHITECTURES: dict[str, Architecture] = {
    "qwen3_5": QWEN3_5,
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5,
}
"""`model_type` of config.json -> what understands it."""


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The architecture that a config names. Raises CheckpointError where it is none of ours."""
    stated = config.get("model_type")
    if not isinstance(stated, str) or stated not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"config.json: model_type {stated!r} is not known, known are {known}", "give a checkpoint of the Qwen3.5 family"
        )
    return ARCHITECTURES[stated]


def survey(source: TensorSource) -> Survey:
    """The map of what is stored as expected, with every complaint about the rest. Raises CheckpointError where the config cannot be read."""
    return architecture_of(source.config).survey(source)


def map_of(source: TensorSource) -> ModelMap:
    """The map of a checkpoint that is whole. Raises CheckpointError with all that is wrong: unknown, missing or misshapen tensors, an incomplete
    MTP head, numbers of experts that disagree."""
    found = survey(source)
    if found.complaints:
        mends = dict.fromkeys(mend for _, mend in found.complaints)
        raise CheckpointError("\n".join(what for what, _ in found.complaints), "; ".join(mends))
    return found.map


def sketch(config: dict[str, Any]) -> Sketch:
    """A weightless source with the tensors of the published checkpoint of this config: what `plan` works from. Raises CheckpointError."""
    return architecture_of(config).sketch(config)
