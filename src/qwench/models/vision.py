"""The vision tower's tensors: names and shapes from `vision_config`. It is carried, not run.

A patch embedding (a 3-D convolution over time, height and width), a learned grid of positions, blocks of attention and MLP with biases and ordinary
layer norms, and a merger that turns `spatial_merge_size`^2 patches into one token. DeepStack checkpoints carry one more merger for each entry of
`deepstack_visual_indexes`; those normalize after merging, so their norm is as wide as the merged patch.

Roles are `vision.` and the rest of the stored name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qwench.errors import CheckpointError
from qwench.models.claims import Claim, bare, one

PREFIX = "model.visual."
NUMBERS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "in_channels",
    "spatial_merge_size",
    "num_position_embeddings",
    "out_hidden_size",
)


def vision_claims(vision: Mapping[str, Any]) -> Iterator[Claim]:
    """Every tensor of the tower. Raises CheckpointError where its config lacks a number."""
    if absent := [n for n in NUMBERS if not isinstance(vision.get(n), int)]:
        raise CheckpointError(
            f"config.json: vision_config lacks {', '.join(absent)}", "take config.json from the original checkpoint"
        )
    hidden, wide = vision["hidden_size"], vision["intermediate_size"]
    merged = hidden * vision["spatial_merge_size"] ** 2
    yield _plain("patch_embed.proj", (hidden, vision["in_channels"], *_patch(vision)))
    yield _bias("patch_embed.proj", hidden)
    yield _plain("pos_embed", (vision["num_position_embeddings"], hidden))
    for i in range(vision["depth"]):
        for norm in ("norm1", "norm2"):
            yield from _norm(f"blocks.{i}.{norm}", hidden)
        yield from _linear(f"blocks.{i}.attn.qkv", 3 * hidden, hidden)
        yield from _linear(f"blocks.{i}.attn.proj", hidden, hidden)
        yield from _linear(f"blocks.{i}.mlp.linear_fc1", wide, hidden)
        yield from _linear(f"blocks.{i}.mlp.linear_fc2", hidden, wide)
    yield from _merger("merger", hidden, merged, vision["out_hidden_size"])
    for i in range(len(vision.get("deepstack_visual_indexes") or ())):
        yield from _merger(f"deepstack_merger_list.{i}", merged, merged, vision["out_hidden_size"])


def _patch(vision: Mapping[str, Any]) -> tuple[int, int, int]:
    """Frames, rows and columns of one patch."""
    size, frames = vision.get("patch_size", 16), vision.get("temporal_patch_size", 2)
    rows, columns = (size, size) if isinstance(size, int) else size
    return (frames if isinstance(frames, int) else frames[0]), rows, columns


def _merger(name: str, normed: int, merged: int, out: int) -> Iterator[Claim]:
    yield from _norm(f"{name}.norm", normed)
    yield from _linear(f"{name}.linear_fc1", merged, merged)
    yield from _linear(f"{name}.linear_fc2", out, merged)


def _linear(name: str, outputs: int, inputs: int) -> Iterator[Claim]:
    yield one(f"vision.{name}.weight", PREFIX + name, (outputs, inputs), linear=True)
    yield _bias(name, outputs)


def _norm(name: str, width: int) -> Iterator[Claim]:
    yield _plain(name, (width,))
    yield _bias(name, width)


def _plain(name: str, shape: tuple[int, ...]) -> Claim:
    return one(f"vision.{name}.weight", PREFIX + name, shape)


def _bias(name: str, width: int) -> Claim:
    return bare(f"vision.{name}.bias", f"{PREFIX}{name}.bias", (width,))
