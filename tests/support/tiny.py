"""Random checkpoints of a few megabytes in every published layout of Qwen3.5.

The names and shapes are written out by hand here, so that the map under test is not compared with itself. Dimensions differ from each other,
inner dimensions are multiples of 128, and nothing sits at a value that would hide a mistake: zero-centred norms are drawn around 0 with
deviation 0.3 (a reader that forgets the 1 is off by everything), A_log and dt_bias are random.

    write_tiny(tmp_path / "m", moe=True, layout="causal", trunk_experts="single", shards=3)

Letters in comments: D hidden size, E experts, I expert width.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

Layout = Literal["conditional", "causal"]
Experts = Literal["fused", "single"]
Head = Literal["published", "dense", "fused", "single"]
"""`published`: dense in a dense checkpoint, one by one in a MoE."""

COMMON: dict[str, Any] = dict(
    attention_bias=False, attention_dropout=0.0, attn_output_gate=True, dtype="bfloat16", full_attention_interval=4,
    hidden_act="silu", initializer_range=0.02, max_position_embeddings=512, mtp_num_hidden_layers=1,
    mtp_use_dedicated_embeddings=False, rms_norm_eps=1e-6, use_cache=True, mamba_ssm_dtype="float32",
    linear_conv_kernel_dim=4, hidden_size=128, num_hidden_layers=4,
    layer_types=["linear_attention"] * 3 + ["full_attention"],
)  # fmt: skip
ROPE: dict[str, Any] = dict(rope_type="default", rope_theta=10_000_000, partial_rotary_factor=0.25, mrope_interleaved=True)

DENSE: dict[str, Any] = COMMON | dict(
    model_type="qwen3_5_text", vocab_size=352, intermediate_size=640, rope_parameters=ROPE | {"mrope_section": [3, 3, 2]},
    head_dim=64, num_attention_heads=6, num_key_value_heads=3,
    linear_num_key_heads=2, linear_num_value_heads=8, linear_key_head_dim=48, linear_value_head_dim=64,
)  # fmt: skip
MOE: dict[str, Any] = COMMON | dict(
    model_type="qwen3_5_moe_text", vocab_size=416, rope_parameters=ROPE | {"mrope_section": [5, 4, 3]},
    head_dim=96, num_attention_heads=4, num_key_value_heads=2,
    linear_num_key_heads=2, linear_num_value_heads=8, linear_key_head_dim=40, linear_value_head_dim=112,
    num_experts=6, num_experts_per_tok=2, moe_intermediate_size=256, shared_expert_intermediate_size=640,
    router_aux_loss_coef=0.001, output_router_logits=False,
)  # fmt: skip


def tiny_config(
    *, moe: bool = False, layout: Layout = "conditional", mtp: bool = True, vision: bool = True, tied: bool = False
) -> dict[str, Any]:
    """The `config.json` of a tiny checkpoint, as published configs are written."""
    text = copy.deepcopy(MOE if moe else DENSE) | {"tie_word_embeddings": tied}
    if not mtp:
        text["mtp_num_hidden_layers"] = 0
    name, model_type = ("Qwen3_5Moe", "qwen3_5_moe") if moe else ("Qwen3_5", "qwen3_5")
    if layout == "causal":
        return text | {"architectures": [f"{name}ForCausalLM"]}
    config: dict[str, Any] = dict(
        architectures=[f"{name}ForConditionalGeneration"], model_type=model_type, tie_word_embeddings=tied, text_config=text,
        image_token_id=6, video_token_id=7, vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    if vision:
        hidden, intermediate = (24, 96) if moe else (48, 160)
        config["vision_config"] = dict(
            model_type=model_type, depth=2, hidden_size=hidden, hidden_act="gelu_pytorch_tanh", intermediate_size=intermediate,
            num_heads=3, in_channels=3, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
            num_position_embeddings=144, deepstack_visual_indexes=[], out_hidden_size=text["hidden_size"],
        )  # fmt: skip
    return config


def _mlp_shapes(text: dict[str, Any], experts: Experts) -> dict[str, tuple[int, ...]]:
    hidden = text["hidden_size"]
    if "num_experts" not in text:
        wide = text["intermediate_size"]
        return {
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
        }
    count, width, shared = text["num_experts"], text["moe_intermediate_size"], text["shared_expert_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.gate.weight": (count, hidden),
        "mlp.shared_expert_gate.weight": (1, hidden),
        "mlp.shared_expert.gate_proj.weight": (shared, hidden),
        "mlp.shared_expert.up_proj.weight": (shared, hidden),
        "mlp.shared_expert.down_proj.weight": (hidden, shared),
    }
    if experts == "fused":
        return shapes | {
            "mlp.experts.gate_up_proj": (count, 2 * width, hidden),
            "mlp.experts.down_proj": (count, hidden, width),
        }
    for i in range(count):
        shapes[f"mlp.experts.{i}.gate_proj.weight"] = (width, hidden)
        shapes[f"mlp.experts.{i}.up_proj.weight"] = (width, hidden)
        shapes[f"mlp.experts.{i}.down_proj.weight"] = (hidden, width)
    return shapes


def _layer_shapes(text: dict[str, Any], kind: str, experts: Experts) -> dict[str, tuple[int, ...]]:
    hidden, head = text["hidden_size"], text["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if kind == "full_attention":
        queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
        return shapes | {
            "self_attn.q_proj.weight": (2 * queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            **_mlp_shapes(text, experts),
        }
    heads, wide = text["linear_num_value_heads"], text["linear_value_head_dim"]
    keys, values = text["linear_num_key_heads"] * text["linear_key_head_dim"], heads * wide
    return shapes | {
        "linear_attn.in_proj_qkv.weight": (2 * keys + values, hidden),
        "linear_attn.in_proj_z.weight": (values, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.out_proj.weight": (hidden, values),
        "linear_attn.conv1d.weight": (2 * keys + values, 1, text["linear_conv_kernel_dim"]),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (wide,),
        **_mlp_shapes(text, experts),
    }


def _vision_shapes(vision: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, wide, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = hidden * vision["spatial_merge_size"] ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (hidden, vision["in_channels"], vision["temporal_patch_size"], patch, patch),
        "patch_embed.proj.bias": (hidden,),
        "pos_embed.weight": (vision["num_position_embeddings"], hidden),
        "merger.norm.weight": (hidden,),
        "merger.norm.bias": (hidden,),
        "merger.linear_fc1.weight": (merged, merged),
        "merger.linear_fc1.bias": (merged,),
        "merger.linear_fc2.weight": (vision["out_hidden_size"], merged),
        "merger.linear_fc2.bias": (vision["out_hidden_size"],),
    }
    for i in range(vision["depth"]):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (hidden,), f"blocks.{i}.{norm}.bias": (hidden,)}
        for name, outputs, inputs in (
            ("attn.qkv", 3 * hidden, hidden),
            ("attn.proj", hidden, hidden),
            ("mlp.linear_fc1", wide, hidden),
            ("mlp.linear_fc2", hidden, wide),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (outputs, inputs), f"blocks.{i}.{name}.bias": (outputs,)}
    return shapes


def tiny_shapes(
    config: dict[str, Any], trunk_experts: Experts = "fused", mtp_experts: Experts = "single"
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint that a config describes; MTP where `mtp_num_hidden_layers` asks for it."""
    text = config.get("text_config", config)
    prefix = "model.language_model." if "text_config" in config else "model."
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (vocabulary, hidden),
        f"{prefix}norm.weight": (hidden,),
    }
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for i, kind in enumerate(text["layer_types"]):
        shapes |= {f"{prefix}layers.{i}.{name}": shape for name, shape in _layer_shapes(text, kind, trunk_experts).items()}
    if text["mtp_num_hidden_layers"]:
        shapes |= {f"mtp.layers.0.{name}": shape for name, shape in _layer_shapes(text, "full_attention", mtp_experts).items()}
        shapes |= {f"mtp.{name}.weight": (hidden,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
        shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
    if "vision_config" in config:
        shapes |= {f"model.visual.{name}": shape for name, shape in _vision_shapes(config["vision_config"]).items()}
    return shapes


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        return torch.empty(shape).uniform_(0.2, 8.0, generator=generator).log()
    if name.endswith("linear_attn.norm.weight") or ("visual" in name and "norm" in name and name.endswith("weight")):
        return 1 + 0.3 * noise
    if "norm" in name:
        return 0.3 * noise
    if "conv1d" in name:
        return 0.5 * noise
    return noise * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)


def tiny_tensors(shapes: dict[str, tuple[int, ...]], *, seed: int = 0, float32: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Random values, drawn in float32, stored in BF16 (float32 where the name contains one of `float32`)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: _random(name, shape, generator) for name, shape in sorted(shapes.items())}
    return {n: t if any(part in n for part in float32) else t.to(torch.bfloat16) for n, t in drawn.items()}


def save_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """Write config.json and the safetensors: one file, or `shards` with an index. Neighbours by name (an expert's gate and up) go to
    different shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(weight_map.values())):
        save_file({n: tensors[n] for n, f in weight_map.items() if f == file}, folder / file, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return folder


def write_tiny(
    folder: Path, *, moe: bool = False, layout: Layout = "conditional", trunk_experts: Experts = "fused",
    mtp: Head | None = "published", vision: bool = True, tied: bool = False, shards: int = 1, seed: int = 0,
    float32: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """Write a tiny checkpoint and return its folder.

    Args:
        moe: experts and a shared expert instead of dense MLPs.
        layout: `conditional` (`model.language_model.*`, `model.visual.*`) or `causal` (`model.layers.*`, never a tower).
        trunk_experts: how the trunk's experts are stored.
        mtp: how the MTP head is stored; None for a checkpoint without one, and without a mention of it in its config.
        tied: no `lm_head.weight`.
        shards: number of files.
        float32: stored in float32 where a tensor's name contains one of these (`("A_log", "visual.")`).
    """
    assert mtp is None or mtp == "published" or (mtp == "dense") == (not moe), "a MoE has a MoE head, a dense model a dense one"
    config = tiny_config(moe=moe, layout=layout, mtp=mtp is not None, vision=vision, tied=tied)
    shapes = tiny_shapes(config, trunk_experts, "fused" if mtp == "fused" else "single")
    return save_checkpoint(folder, config, tiny_tensors(shapes, seed=seed, float32=float32), shards)
