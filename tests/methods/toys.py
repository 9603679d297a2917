"""Decoder parts of Qwen3.5 in a few lines each, as functions of their weights by role; every dimension has its own size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]

HIDDEN, INNER, SHARED, EXPERT_INNER, EXPERTS, TOP_K = 64, 96, 48, 32, 5, 2
QUERY_HEADS, VALUE_HEADS, HEAD = 6, 2, 16


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def norm(weight: Tensor, x: Tensor, zero_centred: bool = True) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (weight + 1 if zero_centred else weight)


def mlp_weights(seed: int = 0, inner: int = INNER) -> Weights:
    shapes = {"mlp.gate": (inner, HIDDEN), "mlp.up": (inner, HIDDEN), "mlp.down": (HIDDEN, inner)}
    return {role: random(*shape, seed=seed + i) / shape[1] ** 0.5 for i, (role, shape) in enumerate(shapes.items())}


def mlp(w: Weights, x: Tensor, name: str = "mlp") -> Tensor:
    return F.linear(F.silu(F.linear(x, w[f"{name}.gate"])) * F.linear(x, w[f"{name}.up"]), w[f"{name}.down"])


def moe_weights(seed: int = 0) -> Weights:
    shapes = {
        "router": (EXPERTS, HIDDEN),
        "shared.router": (1, HIDDEN),
        "shared.gate": (SHARED, HIDDEN),
        "shared.up": (SHARED, HIDDEN),
        "shared.down": (HIDDEN, SHARED),
        "expert.gate": (EXPERTS, EXPERT_INNER, HIDDEN),
        "expert.up": (EXPERTS, EXPERT_INNER, HIDDEN),
        "expert.down": (EXPERTS, HIDDEN, EXPERT_INNER),
    }
    return {role: random(*shape, seed=seed + i) / shape[-1] ** 0.5 for i, (role, shape) in enumerate(shapes.items())}


def moe(w: Weights, x: Tensor) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = torch.topk(F.linear(tokens, w["router"]).softmax(-1), TOP_K)
    weights = weights / weights.sum(-1, keepdim=True)
    result = torch.sigmoid(F.linear(tokens, w["shared.router"])) * mlp(w, tokens, "shared")
    for j in range(EXPERTS):
        own = {f"mlp.{part}": w[f"expert.{part}"][j] for part in ("gate", "up", "down")}
        result = result + (weights * (chosen == j)).sum(-1, keepdim=True) * mlp(own, tokens)
    return result.view(x.shape)


def attention_weights(seed: int = 0) -> Weights:
    shapes = {
        "attention.q": (QUERY_HEADS * 2 * HEAD, HIDDEN),
        "attention.k": (VALUE_HEADS * HEAD, HIDDEN),
        "attention.v": (VALUE_HEADS * HEAD, HIDDEN),
        "attention.o": (HIDDEN, QUERY_HEADS * HEAD),
    }
    made = {role: random(*shape, seed=seed + i) / shape[1] ** 0.5 for i, (role, shape) in enumerate(shapes.items())}
    return made | {"attention.q_norm": 0.3 * random(HEAD, seed=seed + 8), "attention.k_norm": 0.3 * random(HEAD, seed=seed + 9)}


def attention(w: Weights, x: Tensor) -> Tensor:
    """Causal grouped-query attention; q_proj carries query and output gate, head by head."""
    return F.linear(attention_heads(w, x), w["attention.o"])


def attention_heads(w: Weights, x: Tensor) -> Tensor:
    """What o_proj reads, [B, T, QUERY_HEADS * HEAD]."""
    batch, length, _ = x.shape
    query, gate = F.linear(x, w["attention.q"]).view(batch, length, QUERY_HEADS, 2 * HEAD).chunk(2, -1)
    query = norm(w["attention.q_norm"], query).transpose(1, 2)
    key = norm(w["attention.k_norm"], F.linear(x, w["attention.k"]).view(batch, length, VALUE_HEADS, HEAD)).transpose(1, 2)
    value = F.linear(x, w["attention.v"]).view(batch, length, VALUE_HEADS, HEAD).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return mixed.transpose(1, 2).reshape(batch, length, -1) * torch.sigmoid(gate.reshape(batch, length, -1))
