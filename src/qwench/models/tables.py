"""What a Qwen3.5 checkpoint holds, weight by weight: dense and MoE, in every layout that is published.

Two prefixes: conditional generation stores the decoder behind `model.language_model.`, text-only causal LM behind `model.`. Experts are fused
(`mlp.experts.gate_up_proj` [E, 2I, D], gate in the upper half, and `down_proj` [E, D, I]) or stored one by one (`mlp.experts.7.gate_proj.weight`
[I, D] ...), and a checkpoint mixes both: the published Qwen3.5-35B-A3B has a fused trunk and an MTP head of single experts. So every layer's layout is
read off the names that are stored, never off the config.

Letters in shapes: D hidden size, E experts, I expert width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

from qwench.models.claims import Claim, bare, one
from qwench.models.geometry import Geometry, LayerKind
from qwench.models.map import Slot
from qwench.models.vision import vision_claims

ExpertLayout = Literal["fused", "single"]
ExpertLayoutOf = Callable[[str], ExpertLayout]
"""How the experts' tensor of a name such as `mtp.layers.0.mlp.experts.gate_up_proj` is stored."""

CONDITIONAL, CAUSAL, MTP = "model.language_model.", "model.", "mtp."


SINGLE = re.compile(r"(?P<stem>.*\.experts)\.\d+\.(?P<leaf>gate_proj|up_proj|down_proj)\.weight$")
"""A matrix of one expert that is stored by itself."""


def prefix_of(names: Collection[str]) -> str:
    """The decoder's prefix in a checkpoint that stores these names."""
    return CONDITIONAL if any(n.startswith(CONDITIONAL) for n in names) else CAUSAL


def expert_layout_of(names: Collection[str]) -> ExpertLayoutOf:
    """The layout that the stored names show, those of any expert; where they show nothing, the published one."""
    shown = {(found["stem"], found["leaf"]) for name in names if (found := SINGLE.match(name))}

    def layout(fused: str) -> ExpertLayout:
        stem, _, projection = fused.rpartition(".")
        singles = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
        if fused in names:
            return "fused"
        return "single" if any((stem, name) in shown for name in singles) else published(fused)

    return layout


def published(fused: str) -> ExpertLayout:
    """The layout of the published checkpoints: a fused trunk, an MTP head of single experts."""
    return "single" if fused.startswith(MTP) else "fused"


# One row a weight. The names are those of the transformers classes.


def attention_claims(g: Geometry, stem: str, tag: str, layer: int) -> Iterator[Claim]:
    yield one(
        f"{tag}attention.q", f"{stem}self_attn.q_proj", (2 * g.queries, g.hidden), layer=layer, linear=True
    )  # query and output gate
    yield one(f"{tag}attention.k", f"{stem}self_attn.k_proj", (g.keys, g.hidden), layer=layer, linear=True)
    yield one(f"{tag}attention.v", f"{stem}self_attn.v_proj", (g.keys, g.hidden), layer=layer, linear=True)
    yield one(f"{tag}attention.q_norm", f"{stem}self_attn.q_norm", (g.head,), layer=layer)
    yield one(f"{tag}attention.k_norm", f"{stem}self_attn.k_norm", (g.head,), layer=layer)
    yield one(f"{tag}attention.o", f"{stem}self_attn.o_proj", (g.hidden, g.queries), layer=layer, linear=True)


def delta_claims(g: Geometry, stem: str, tag: str, layer: int) -> Iterator[Claim]:
    yield one(f"{tag}delta.qkv", f"{stem}linear_attn.in_proj_qkv", (g.convolved, g.hidden), layer=layer, linear=True)
    yield one(f"{tag}delta.z", f"{stem}linear_attn.in_proj_z", (g.delta_values, g.hidden), layer=layer, linear=True)
    yield one(f"{tag}delta.b", f"{stem}linear_attn.in_proj_b", (g.delta_heads, g.hidden), layer=layer, linear=True)
    yield one(f"{tag}delta.a", f"{stem}linear_attn.in_proj_a", (g.delta_heads, g.hidden), layer=layer, linear=True)
    yield one(f"{tag}delta.conv", f"{stem}linear_attn.conv1d", (g.convolved, 1, g.kernel), layer=layer)
    yield bare(f"{tag}delta.A_log", f"{stem}linear_attn.A_log", (g.delta_heads,), layer=layer)
    yield bare(f"{tag}delta.dt_bias", f"{stem}linear_attn.dt_bias", (g.delta_heads,), layer=layer)
    yield one(f"{tag}delta.norm", f"{stem}linear_attn.norm", (g.delta_head_value,), layer=layer)
    yield one(f"{tag}delta.out", f"{stem}linear_attn.out_proj", (g.hidden, g.delta_values), layer=layer, linear=True)


def mlp_claims(role: str, module: str, width: int, hidden: int, layer: int) -> Iterator[Claim]:
    yield one(f"{role}.gate", f"{module}.gate_proj", (width, hidden), layer=layer, linear=True)
    yield one(f"{role}.up", f"{module}.up_proj", (width, hidden), layer=layer, linear=True)
    yield one(f"{role}.down", f"{module}.down_proj", (hidden, width), layer=layer, linear=True)


def moe_claims(g: Geometry, stem: str, tag: str, layer: int, layout: ExpertLayoutOf) -> Iterator[Claim]:
    yield one(f"{tag}router", f"{stem}mlp.gate", (g.experts, g.hidden), layer=layer, linear=True)
    yield one(f"{tag}shared.router", f"{stem}mlp.shared_expert_gate", (1, g.hidden), layer=layer, linear=True)
    yield from mlp_claims(f"{tag}shared", f"{stem}mlp.shared_expert", g.shared_width, g.hidden, layer)
    width = g.expert_width
    halves = (("gate", slice(0, width)), ("up", slice(width, 2 * width)))
    yield from _experts(g, f"{stem}mlp.experts.", "gate_up_proj", (width, g.hidden), halves, tag, layer, layout)
    yield from _experts(g, f"{stem}mlp.experts.", "down_proj", (g.hidden, width), (("down", None),), tag, layer, layout)


def _experts(
    g: Geometry, stem: str, fused: str, shape: tuple[int, int], halves: tuple[tuple[str, slice | None], ...],
    tag: str, layer: int, layout: ExpertLayoutOf,
) -> Iterator[Claim]:  # fmt: skip
    """The same weights, as parts of one 3-D tensor or each in its own."""
    if layout(stem + fused) == "single":
        for e in range(g.experts):
            for half, _ in halves:
                yield one(f"{tag}expert.{half}", f"{stem}{e}.{half}_proj", shape, layer=layer, expert=e, linear=True)
        return
    slots = tuple(
        Slot(
            role=f"{tag}expert.{half}",
            module=f"{stem}{e}.{half}_proj",
            shape=shape,
            tensor=stem + fused,
            part=(e,) if rows is None else (e, rows),
            layer=layer,
            expert=e,
            linear=True,
        )
        for e in range(g.experts)
        for half, rows in halves
    )
    yield Claim(stem + fused, (g.experts, len(halves) * shape[0], shape[1]), slots)


def layer_claims(g: Geometry, kind: LayerKind, stem: str, tag: str, layer: int, layout: ExpertLayoutOf) -> Iterator[Claim]:
    """One decoder layer in reading order; `stem` is `model.layers.3.`, `tag` is what roles begin with (`mtp.` or nothing)."""
    yield one(f"{tag}norm.input", f"{stem}input_layernorm", (g.hidden,), layer=layer)
    yield from (attention_claims if kind == "full_attention" else delta_claims)(g, stem, tag, layer)
    yield one(f"{tag}norm.post", f"{stem}post_attention_layernorm", (g.hidden,), layer=layer)
    if g.moe:
        yield from moe_claims(g, stem, tag, layer, layout)
    else:
        yield from mlp_claims(f"{tag}mlp", f"{stem}mlp", g.intermediate, g.hidden, layer)


def trunk_claims(g: Geometry, prefix: str, head: bool) -> Iterator[Claim]:
    """What stands outside of the layers; `head`: a tensor for the head is expected."""
    yield one("embed", f"{prefix}embed_tokens", (g.vocabulary, g.hidden))
    yield one("norm.final", f"{prefix}norm", (g.hidden,))
    if head:
        yield one("head", "lm_head", (g.vocabulary, g.hidden), linear=True)


def mtp_claims(g: Geometry) -> Iterator[Claim]:
    """What stands outside of the MTP head's layers."""
    yield one("mtp.fc", "mtp.fc", (g.hidden, 2 * g.hidden), linear=True)
    for norm, name in (("embedding", "pre_fc_norm_embedding"), ("hidden", "pre_fc_norm_hidden"), ("final", "norm")):
        yield one(f"mtp.norm.{norm}", f"mtp.{name}", (g.hidden,))


def tower_claims(config: Mapping[str, Any]) -> tuple[Claim, ...]:
    """The tower that the config describes; nothing where it describes none."""
    vision = config.get("vision_config")
    return tuple(vision_claims(vision)) if isinstance(vision, Mapping) else ()
