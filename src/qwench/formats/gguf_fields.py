"""The metadata of a GGUF file: a list of named values, and those that describe the network.

llama.cpp builds its graph from these numbers alone; config.json is not in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf

from qwench.errors import CheckpointError
from qwench.formats.gguf_tensors import Content
from qwench.models.geometry import read_geometry, text_config
from qwench.models.map import ModelMap

Kind = Literal["string", "uint32", "float32", "bool", "strings", "int32s", "float32s", "bools"]
SECTIONS = [11, 11, 10]
"""Pairs of rotary channels for time, height and width where the config does not say."""


@dataclass(frozen=True)
class Field:
    """One entry of the metadata. Lists are written with the element type that their kind names."""

    key: str
    kind: Kind
    value: Any


ELEMENT = {
    "strings": gguf.GGUFValueType.STRING,
    "int32s": gguf.GGUFValueType.INT32,
    "float32s": gguf.GGUFValueType.FLOAT32,
    "bools": gguf.GGUFValueType.BOOL,
}


def add_field(writer: gguf.GGUFWriter, field: Field) -> None:
    """Hand a field to the library's writer."""
    if field.kind in ELEMENT:
        writer.add_key_value(field.key, field.value, gguf.GGUFValueType.ARRAY, sub_type=ELEMENT[field.kind])
    else:
        writer.add_key_value(field.key, field.value, gguf.GGUFValueType[field.kind.upper()])


def architecture(map: ModelMap, content: Content) -> str:
    """What llama.cpp calls the network."""
    return "clip" if content == "vision" else "qwen35moe" if map.model_type == "qwen3_5_moe" else "qwen35"


def text_fields(config: Mapping[str, Any], map: ModelMap, content: Content, name: str, file_type: int) -> list[Field]:
    """The decoder's numbers. Raises CheckpointError where the config lacks one that llama.cpp needs."""
    g, text, arch = read_geometry(config), text_config(config), architecture(map, content)
    heads = len(map.mtp) if content != "trunk" else 0
    rope, partial = _rope(text)
    sections = [*rope.get("mrope_section", SECTIONS), 0, 0, 0, 0][:4]
    recurrent = [b.kind == "linear_attention" for b in map.blocks] + [False] * heads
    numbers: list[tuple[str, Kind, Any]] = [
        ("block_count", "uint32", len(map.blocks) + heads),
        ("context_length", "uint32", g.context or 262144),
        ("embedding_length", "uint32", g.hidden),
        ("attention.head_count", "uint32", g.queries // g.head),
        ("attention.head_count_kv", "uint32", g.keys // g.head),
        ("attention.key_length", "uint32", g.head),
        ("attention.value_length", "uint32", g.head),
        ("attention.layer_norm_rms_epsilon", "float32", text.get("rms_norm_eps", 1e-6)),
        ("attention.recurrent_layers", "bools", recurrent),
        ("full_attention_interval", "uint32", text.get("full_attention_interval") or 4),
        ("rope.dimension_sections", "int32s", sections),
        ("rope.dimension_count", "uint32", int(g.head * partial)),
        ("rope.freq_base", "float32", float(rope.get("rope_theta", text.get("rope_theta", 10_000_000)))),
        *_scaling(rope),
        ("ssm.conv_kernel", "uint32", g.kernel),
        ("ssm.state_size", "uint32", g.delta_head_key),
        ("ssm.group_count", "uint32", g.delta_keys // g.delta_head_key),
        ("ssm.time_step_rank", "uint32", g.delta_heads),
        ("ssm.inner_size", "uint32", g.delta_values),
    ]
    if g.intermediate:
        numbers.append(("feed_forward_length", "uint32", g.intermediate))
    if g.moe:
        numbers += [
            ("expert_count", "uint32", g.experts),
            ("expert_used_count", "uint32", g.chosen),
            ("expert_feed_forward_length", "uint32", g.expert_width),
            ("expert_shared_feed_forward_length", "uint32", g.shared_width),
        ]
    if heads:
        numbers.append(("nextn_predict_layers", "uint32", heads))
    return [*_general(arch, "model", name, file_type), *(Field(f"{arch}.{key}", kind, value) for key, kind, value in numbers)]


def _general(arch: str, kind: str, name: str, file_type: int) -> list[Field]:
    return [
        Field("general.architecture", "string", arch),
        Field("general.type", "string", kind),
        Field("general.name", "string", name),
        Field("general.file_type", "uint32", file_type),
        Field("general.quantization_version", "uint32", gguf.GGML_QUANT_VERSION),
    ]


def _rope(text: Mapping[str, Any]) -> tuple[Mapping[str, Any], float]:
    """The rotary embedding's parameters, and the share of a head that it turns."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return rope, float(rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.25)))


def _scaling(rope: Mapping[str, Any]) -> list[tuple[str, Kind, Any]]:
    """Extension of the context beyond training; `default` needs no word. Raises CheckpointError for kinds that llama.cpp has not."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return []
    if kind not in ("linear", "yarn") or "factor" not in rope:
        raise CheckpointError(
            f"config.json: rope_type {kind!r} has no counterpart in llama.cpp (linear and yarn have)",
            "use the default rope_parameters",
        )
    fields: list[tuple[str, Kind, Any]] = [
        ("rope.scaling.type", "string", kind),
        ("rope.scaling.factor", "float32", float(rope["factor"])),
    ]
    if "original_max_position_embeddings" in rope:
        fields.append(("rope.scaling.original_context_length", "uint32", rope["original_max_position_embeddings"]))
    return fields


def vision_fields(config: Mapping[str, Any], folder: Path, name: str, file_type: int) -> list[Field]:
    """The tower's numbers, and how images are prepared. Raises CheckpointError where preprocessor_config.json lacks mean and deviation."""
    vision, text = config["vision_config"], text_config(config)
    patch = vision.get("patch_size", 16)
    mean, deviation = _pixels(folder)
    deepstack = set(vision.get("deepstack_visual_indexes") or [])
    side = math.isqrt(vision["num_position_embeddings"])
    return [
        *_general("clip", "mmproj", name, file_type),
        Field("clip.has_vision_encoder", "bool", True),
        Field("clip.projector_type", "string", "qwen3vl_merger"),
        Field("clip.use_gelu", "bool", True),
        Field("clip.vision.projection_dim", "uint32", text["hidden_size"]),
        Field("clip.vision.image_size", "uint32", side * patch),
        Field("clip.vision.patch_size", "uint32", patch),
        Field("clip.vision.embedding_length", "uint32", vision["hidden_size"]),
        Field("clip.vision.feed_forward_length", "uint32", vision["intermediate_size"]),
        Field("clip.vision.block_count", "uint32", vision["depth"]),
        Field("clip.vision.attention.head_count", "uint32", vision["num_heads"]),
        Field("clip.vision.attention.layer_norm_epsilon", "float32", text.get("rms_norm_eps", 1e-6)),
        Field("clip.vision.spatial_merge_size", "uint32", vision.get("spatial_merge_size", 2)),
        Field("clip.vision.is_deepstack_layers", "bools", [i in deepstack for i in range(vision["depth"])]),
        Field("clip.vision.image_mean", "float32s", mean),
        Field("clip.vision.image_std", "float32s", deviation),
    ]


def _pixels(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and deviation that pixels are normalized with."""
    settings: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}", "fetch it again") from None
        settings |= found | (found.get("image_processor") or {})
    try:
        return [float(v) for v in settings["image_mean"]], [float(v) for v in settings["image_std"]]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{folder} has no preprocessor_config.json with image_mean and image_std, which mmproj carries",
            "fetch preprocessor_config.json from the original checkpoint",
        ) from None
