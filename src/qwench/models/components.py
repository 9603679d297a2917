"""The parts of a checkpoint that get lost and can be put back: the MTP head and the vision tower.

Fine-tuning tools drop them without a word, and leave their traces in config.json. What a checkpoint ought to hold of a part follows from a config; which of the published layouts it is
stored in (a dense head, a MoE head with fused experts or with single ones) follows from the names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qwench.checkpoint.source import TensorSource
from qwench.models.claims import Claim, fits, summary, unclaimed
from qwench.models.geometry import Complaint, text_config
from qwench.models.layout import PREFIXES
from qwench.models.qwen3_5 import claims_of

NAMES = {"mtp": "MTP head", "vision": "vision tower"}
"""What people call them."""

NUMBERS = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
)  # fmt: skip
"""Keys of a decoder's config that the shapes of an MTP layer follow from; which of them a config has depends on whether it has experts."""

SETTINGS = ("rms_norm_eps", "rope_parameters", "attn_output_gate", "hidden_act")
"""Keys that change what the same weights compute."""


def component_names(names: Collection[str], component: str) -> list[str]:
    """The stored tensors of a component, in order."""
    return [name for name in names if name.startswith(PREFIXES[component])]


def component_complaints(component: str, config: Mapping[str, Any], stored: TensorSource) -> Iterator[Complaint]:
    """What is wrong with a component as it is stored, held against a config (its own, or that of the checkpoint it is to go into)."""
    names = component_names(stored.tensors, component)
    expected = claims_of(component, config, names)
    mend = "fetch the checkpoint again, or take another donor"
    missing = [claim.tensor for claim in expected if claim.tensor not in stored.tensors]
    if missing:
        yield (
            f"the {NAMES[component]} of {stored.folder} is incomplete: {len(expected) - len(missing)} of {len(expected)} tensors are stored, "
            f"missing: {summary(missing)}",
            mend,
        )
    yield from _misshapen(expected, stored)
    yield from unclaimed([claim.tensor for claim in expected] + [n for n in stored.tensors if n not in names], stored)


def differing_numbers(
    config: Mapping[str, Any], other: Mapping[str, Any], keys: Collection[str] = NUMBERS
) -> dict[str, tuple[Any, Any]]:
    """Keys of two decoders' configs that differ, with both values; None where one does not have it."""
    ours, theirs = text_config(config), text_config(other)
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


def _misshapen(expected: Collection[Claim], stored: TensorSource) -> Iterator[Complaint]:
    for claim in expected:
        if claim.tensor in stored.tensors and not fits(claim, stored):
            found = list(stored.tensors[claim.tensor].shape)
            yield (
                f"{claim.tensor} in {stored.folder} is {found}, {list(claim.shape)} is needed",
                "take a donor of the same shape",
            )
