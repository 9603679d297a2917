"""The numbers of a Qwen3.5 decoder, read from its config once and checked.

Published configs hold the decoder's numbers under `text_config` (conditional generation) or at the top level (text-only causal LM). Every number
that a shape depends on has to be there: a default would only turn a damaged config into a wrong shape somewhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from qwench.errors import CheckpointError

LayerKind = Literal["linear_attention", "full_attention"]
Complaint = tuple[str, str]
"""(what is wrong, how to mend it), the arguments of a UserError."""

COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
)  # fmt: skip
DENSE = ("intermediate_size",)
MOE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


@dataclass(frozen=True)
class Geometry:
    """A decoder's dimensions.

    Attributes:
        kinds: the mixer of every layer.
        hidden, vocabulary: width of the residual stream, tokens.
        queries, keys: rows of the queries (without the output gate) and of the keys, which are as wide as the values.
        head: width of an attention head.
        delta_heads: value heads of Gated DeltaNet.
        delta_keys, delta_values: rows of its keys (as wide as its queries) and values over all heads.
        delta_head_key, delta_head_value: width of one of its heads.
        kernel: taps of its causal convolution.
        intermediate: width of the dense MLP; 0 in a MoE.
        experts, chosen: routed experts, and how many a token goes to; 0 in a dense model.
        expert_width, shared_width: width of a routed expert and of the shared one; 0 in a dense model.
        mtp_layers: layers of the MTP head that the config announces.
        tied: the config says that the head is the embedding.
        context: positions that the model was made for; 0 where the config does not say.
    """

    kinds: tuple[LayerKind, ...]
    hidden: int
    vocabulary: int
    queries: int
    keys: int
    head: int
    delta_heads: int
    delta_keys: int
    delta_values: int
    delta_head_key: int
    delta_head_value: int
    kernel: int
    intermediate: int
    experts: int
    chosen: int
    expert_width: int
    shared_width: int
    mtp_layers: int
    tied: bool
    context: int

    @property
    def moe(self) -> bool:
        return self.experts > 0

    @property
    def convolved(self) -> int:
        """Channels of the convolution: queries, keys and values of Gated DeltaNet."""
        return 2 * self.delta_keys + self.delta_values


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` that describes the decoder."""
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise CheckpointError("config.json: text_config is no mapping", "take config.json from the original checkpoint")
    return text


def read_geometry(config: Mapping[str, Any]) -> Geometry:
    """The decoder's dimensions. Raises CheckpointError with everything that is missing or impossible."""
    text = text_config(config)
    moe = "moe" in str(config.get("model_type", ""))
    names = (*COMMON, *(MOE if moe else DENSE))
    complaints = [
        f"config.json: {n} is {text.get(n, 'missing')!s}, not a positive whole number"
        for n in names
        if not _counts(text.get(n))
    ]
    kinds, found = _kinds(text)
    complaints += found
    mtp_layers = text.get("mtp_num_hidden_layers") or 0
    if mtp_layers and not _counts(mtp_layers):
        complaints.append(f"config.json: mtp_num_hidden_layers is {mtp_layers!s}, not a whole number")
    if not complaints:
        complaints += _impossible(text)
    if complaints:
        raise CheckpointError("\n".join(complaints), "take config.json from the original checkpoint")
    positions = text.get("max_position_embeddings")
    number: Mapping[str, int] = {n: text[n] if n in names else 0 for n in (*COMMON, *DENSE, *MOE)}
    return Geometry(
        kinds=kinds,
        hidden=number["hidden_size"],
        vocabulary=number["vocab_size"],
        queries=number["num_attention_heads"] * number["head_dim"],
        keys=number["num_key_value_heads"] * number["head_dim"],
        head=number["head_dim"],
        delta_heads=number["linear_num_value_heads"],
        delta_keys=number["linear_num_key_heads"] * number["linear_key_head_dim"],
        delta_values=number["linear_num_value_heads"] * number["linear_value_head_dim"],
        delta_head_key=number["linear_key_head_dim"],
        delta_head_value=number["linear_value_head_dim"],
        kernel=number["linear_conv_kernel_dim"],
        intermediate=number["intermediate_size"],
        experts=number["num_experts"],
        chosen=number["num_experts_per_tok"],
        expert_width=number["moe_intermediate_size"],
        shared_width=number["shared_expert_intermediate_size"],
        mtp_layers=mtp_layers,
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        context=cast(int, positions) if _counts(positions) else 0,
    )


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _kinds(text: Mapping[str, Any]) -> tuple[tuple[LayerKind, ...], list[str]]:
    """The pattern of mixers, spelled out or by its interval, and what is wrong with it."""
    layers, stated, interval = text.get("num_hidden_layers"), text.get("layer_types"), text.get("full_attention_interval")
    if not _counts(layers):
        return (), []
    count = cast(int, layers)
    if stated is None and _counts(interval):
        every = cast(int, interval)
        return tuple("linear_attention" if (i + 1) % every else "full_attention" for i in range(count)), []
    if not isinstance(stated, Sequence) or isinstance(stated, str):
        return (), ["config.json: neither layer_types nor full_attention_interval says which layers have full attention"]
    unknown = sorted({str(kind) for kind in stated} - {"linear_attention", "full_attention"})
    complaints = (
        [f"config.json: layer_types names {', '.join(unknown)}, known are linear_attention and full_attention"]
        if unknown
        else []
    )
    if len(stated) != count:
        complaints.append(f"config.json: layer_types has {len(stated)} entries, num_hidden_layers is {count}")
    return tuple(stated), complaints


def _impossible(text: Mapping[str, Any]) -> list[str]:
    complaints = []
    for many, few in (("num_attention_heads", "num_key_value_heads"), ("linear_num_value_heads", "linear_num_key_heads")):
        if text[many] % text[few]:
            complaints.append(f"config.json: {many} {text[many]} is no multiple of {few} {text[few]}")
    if text.get("num_experts_per_tok", 0) > text.get("num_experts", text.get("num_experts_per_tok", 0)):
        complaints.append(
            f"config.json: num_experts_per_tok {text['num_experts_per_tok']} exceeds num_experts {text['num_experts']}"
        )
    return complaints
