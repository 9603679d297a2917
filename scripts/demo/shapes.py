"""The two demo architectures. Dimensions differ from each other where the architecture allows it, so that a transpose or a
swapped name cannot hide; all inner dimensions are multiples of 128 (group 128, NVFP4, 128x128 FP8 blocks). Gated DeltaNet heads have 64 channels: vLLM's CPU kernel takes 64 and
128 only."""

from __future__ import annotations

from typing import Any

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
]  # fmt: skip

PATTERN = ["linear_attention"] * 3 + ["full_attention"]

COMMON: dict[str, Any] = dict(
    attention_bias=False, attention_dropout=0.0, attn_output_gate=True, dtype="bfloat16", full_attention_interval=4,
    hidden_act="silu", initializer_range=0.02, max_position_embeddings=4096, mtp_num_hidden_layers=1,
    mtp_use_dedicated_embeddings=False, rms_norm_eps=1e-6, tie_word_embeddings=False, use_cache=True,
    mamba_ssm_dtype="float32", linear_conv_kernel_dim=4, head_dim=64,
)  # fmt: skip
ROPE = dict(
    rope_type="default", rope_theta=10_000_000, partial_rotary_factor=0.25, mrope_section=[3, 3, 2], mrope_interleaved=True
)

DENSE_TEXT = COMMON | dict(
    model_type="qwen3_5_text", rope_parameters=ROPE, vocab_size=1536, hidden_size=256, intermediate_size=512,
    num_hidden_layers=8, layer_types=PATTERN * 2, num_attention_heads=6, num_key_value_heads=2,
    linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=64, linear_value_head_dim=64,
)  # fmt: skip
MOE_TEXT = COMMON | dict(
    model_type="qwen3_5_moe_text", rope_parameters=ROPE, vocab_size=992, hidden_size=128,
    num_hidden_layers=4, layer_types=PATTERN, num_attention_heads=6, num_key_value_heads=3,
    linear_num_key_heads=3, linear_num_value_heads=6, linear_key_head_dim=64, linear_value_head_dim=64,
    num_experts=12, num_experts_per_tok=4, moe_intermediate_size=256, shared_expert_intermediate_size=384,
    router_aux_loss_coef=0.001, output_router_logits=False,
)  # fmt: skip


def vision(model_type: str, hidden: int, intermediate: int, positions: int, out: int) -> dict[str, Any]:
    """The tower: as small as its patch embedding and merger allow."""
    return dict(
        model_type=model_type, depth=2, hidden_size=hidden, hidden_act="gelu_pytorch_tanh", intermediate_size=intermediate,
        num_heads=3, in_channels=3, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
        num_position_embeddings=positions, deepstack_visual_indexes=[], out_hidden_size=out,
    )  # fmt: skip


SHAPES = {
    "dense": dict(architecture="Qwen3_5ForConditionalGeneration", model_type="qwen3_5", text=DENSE_TEXT,
                  vision=vision("qwen3_5", 48, 160, 144, 256), tokens=1500, seed=35),
    "moe": dict(architecture="Qwen3_5MoeForConditionalGeneration", model_type="qwen3_5_moe", text=MOE_TEXT,
                vision=vision("qwen3_5_moe", 24, 32, 36, 128), tokens=980, seed=36),
}  # fmt: skip
