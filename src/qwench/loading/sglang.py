"""How SGLang loads a Qwen3.5, as read in its published packages 0.5.19, 0.5.21 and 0.5.23: it was not run.

The main model and the MTP head are loaded from the same files. What it does not know it drops with a warning that is printed once, so that a wrong file runs: the parameters that it was meant for keep what
memory held. Three things hit Qwen3.5 files:

- Before 0.5.21 the head's class has no list of joined modules, so that `ignore` reaches `qkv_proj` and `gate_up_proj` there only under these names, or by a pattern.
- In the main model, the first tensor of fused experts (`experts.gate_up_proj`) switches the loader to fused names for good: experts stored one by one after it are dropped.
- The experts of a GPTQ file are built quantized whatever `dynamic` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwench.checkpoint.source import TensorEntry
from qwench.formats import Container
from qwench.loading.network import Naming, decoder_claims, head_claims, modules_of, tower_claims
from qwench.loading.parts import Built, Dropped, Into, Load, Model, Module, Placed, Refused, Rule, Stop, refused_model
from qwench.loading.placing import CACHE_SCALE, EXPERT, STACKED, Found, Index
from qwench.loading.replay import build, container_for, load
from qwench.loading.sglang_schemes import decider_of
from qwench.loading.vllm import DELTA, JOINED, is_conditional
from qwench.loading.vllm_others import Packed
from qwench.loading.vllm_schemes import Decider
from qwench.models.claims import Claim
from qwench.models.geometry import read_geometry

_M, _Q = "python/sglang/srt/models", "python/sglang/srt/layers/quantization"


@dataclass(frozen=True)
class Version:
    """What differs between versions.

    Attributes:
        head_knows_members: the MTP class says which modules are joined (sglang #35797).
        weight_only_nvfp4: compressed-tensors NVFP4 without activations has a method (sglang #40022).
        head_switches: in the head too, the first tensor of fused experts switches to fused names for good.
        heads_by_layers: of a mixed ModelOpt file the head is quantized where something of it is listed; before it never was.
    """

    head_knows_members: bool
    weight_only_nvfp4: bool
    head_switches: bool
    heads_by_layers: bool = True


VERSIONS = {
    "0.5.19": Version(head_knows_members=False, weight_only_nvfp4=False, head_switches=True, heads_by_layers=False),
    "0.5.21": Version(head_knows_members=True, weight_only_nvfp4=False, head_switches=False),
    "0.5.23": Version(head_knows_members=True, weight_only_nvfp4=True, head_switches=False),
}
VERSION = "0.5.23"
OLD = "0.5.19"
"""Installed widely: what it does differently is told beside the newest."""

RULES = (
    Rule("trunk-names", "model.language_model. -> model., .self_attn is left out", f"{_M}/qwen3_5.py, load_weights of each class"),
    Rule("text-names", "a text-only model strips model. and knows no model.language_model.", f"{_M}/qwen3_5_text.py, Qwen3_5ForCausalLM.load_weights"),
    Rule("lenient", "a name that no parameter has is skipped with a warning", f"{_M}/qwen3_5.py, load_weights of each class"),
    Rule("experts-strict", "a tensor of an expert whose parameter does not exist is an error in the main model", f"{_M}/qwen3_5.py, Qwen3_5MoeForConditionalGeneration.load_weights"),
    Rule("experts-beyond", "experts whose number is not below num_experts are skipped", f"{_M}/qwen3_5.py, load_weights with FusedMoE.make_expert_params_mapping"),
    Rule("fused-for-good", "after the first tensor of fused experts, experts stored one by one are skipped", f"{_M}/qwen3_5.py, Qwen3_5MoeForConditionalGeneration.load_weights (is_fused_expert)"),
    Rule("tower-plain", "the tower is built unquantized", f"{_M}/qwen3_vl.py, Qwen3VLForConditionalGeneration.__init__"),
    Rule("router-plain", "router and shared_expert_gate are built unquantized", f"{_M}/qwen2_moe.py, Qwen2MoeSparseMoeBlock.__init__"),
    Rule("head-fc", "mtp.fc is a plain linear layer", f"{_M}/qwen3_5_mtp.py, Qwen3_5ForCausalLMMTP.__init__"),
    Rule("head-one-layer", "the head has one layer", f"{_M}/qwen3_5_mtp.py, Qwen3_5ForCausalLMMTP.__init__"),
    Rule("head-members", "before 0.5.21 the head's joined modules are known by their joined names only", f"{_M}/qwen3_5_mtp.py, packed_modules_mapping; issue 35797"),
    Rule("head-skips", "the head skips every tensor without a parameter", f"{_M}/qwen3_5_mtp.py, Qwen3_5ForCausalLMMTP.load_weights"),
    Rule("ct-ignore", "`ignore` means a pattern, a name, or the end of one", f"{_Q}/compressed_tensors/utils.py, check_equal_or_regex_match"),
    Rule("ct-ignore-all-or-none", "`ignore` must name all members of a joined module or none", f"{_Q}/compressed_tensors/utils.py, should_ignore_layer"),
    Rule("ct-named-or-refused", "a linear layer that neither targets nor `ignore` name is an error", f"{_Q}/compressed_tensors/utils.py, find_matched_target"),
    Rule("ct-experts-one-scheme", "expert 0 speaks for the experts of a layer", f"{_Q}/compressed_tensors/compressed_tensors.py, get_moe_scheme"),
    Rule("ct-no-weight-only-nvfp4", "before 0.5.23 NVFP4 without activations has no method", f"{_Q}/compressed_tensors/compressed_tensors.py, _get_scheme_from_parts; issue 40022"),
    Rule("ct-no-weight-only-blocks", "FP8 in blocks has no method without rounded inputs", f"{_Q}/compressed_tensors/compressed_tensors.py, _is_fp8_w8a16"),
    Rule("ct-no-int8-experts", "experts in INT8 with INT8 inputs are for NPUs only", f"{_Q}/compressed_tensors/compressed_tensors.py, get_moe_scheme"),
    Rule("ct-experts-methods", "experts in FP8 have a scale for each row and token, one scale and a stored one, or blocks", f"{_Q}/compressed_tensors/schemes/compressed_tensors_w8a8_fp8_moe.py, CompressedTensorsW8A8Fp8MoE.__init__"),
    Rule("ct-fp8-blocks", "blocks must divide the rows of all that is joined but the last, and the width of experts", f"{_Q}/fp8_utils.py, validate_fp8_block_shape"),
    Rule("nvfp4-one-global", "weight-only NVFP4 refuses joined modules with different global scales; with activations the largest is taken", f"{_Q}/compressed_tensors/schemes/compressed_tensors_w4a16_nvfp4.py, process_weights_after_loading"),
    Rule("gptq-dynamic", "patterns of `dynamic` are matched from the beginning of the joined names; headers are not asked", f"{_Q}/utils.py, get_dynamic_override"),
    Rule("gptq-experts", "experts are quantized whatever `dynamic` says", f"{_Q}/gptq/gptq.py, GPTQMarlinConfig.get_quant_method"),
    Rule("gptq-numbers", "symmetric 4 and 8 bits", f"{_Q}/gptq/gptq.py, GPTQMarlinConfig.TYPE_MAP"),
    Rule("inc-keys", "extra_config by exact name or by an expression for the whole name", f"{_Q}/auto_round.py, AutoRoundConfig.get_layer_config"),
    Rule("inc-all-or-none", "members of a joined module must have the same numbers", f"{_Q}/auto_round.py, AutoRoundConfig.get_layer_config"),
    Rule("fp8-config", "an activation scheme, and blocks of two numbers with dynamic inputs", f"{_Q}/fp8.py, Fp8Config.__init__"),
    Rule("fp8-all-or-none", "`modules_to_not_convert` means names that have an entry as whole components anywhere, with and without model. before it; all members of a joined module or none", f"{_Q}/utils.py, is_layer_skipped"),
    Rule("fp8-blocks", "blocks must divide the rows of every member of a joined module, and the width of experts", f"{_Q}/fp8.py, Fp8LinearMethod.validate_block_quant_shapes"),
    Rule("awq-config", "4 and 8 bits in groups that Marlin reads", f"{_Q}/awq/awq.py, AWQMarlinConfig"),
    Rule("awq-joined", "`modules_to_not_convert` means any part of a name, of a joined module of its joined name alone", f"{_Q}/awq/awq.py, is_layer_skipped_awq"),
    Rule("modelopt-config", "quant_algo FP8, NVFP4, NVFP4_AWQ, W4A16_NVFP4, or MIXED_PRECISION with NVFP4 layers", f"{_Q}/modelopt_quant.py, from_config of each class; configs/model_config.py, _parse_modelopt_quant_config"),
    Rule("modelopt-all-or-none", "excluded modules as with FP8, or by a pattern for the whole name or one component", f"{_Q}/modelopt_quant.py, ModelOptQuantConfig.is_layer_excluded"),
    Rule("modelopt-bare-head", "the head of an NVFP4 file is built unquantized, that of a mixed one where nothing of it is listed (before 0.5.21 always)", f"{_M}/qwen3_5_mtp.py, _mtp_quant_config"),
    Rule("modelopt-largest-scale", "of weight_scale_2 of a joined module the largest is taken", f"{_Q}/modelopt_quant.py, process_weights_after_loading of each method"),
    Rule("cast", "a tensor of the right shape is copied whatever its dtype", "python/sglang/srt/layers/parameter.py"),
    Rule("order", "g_idx is read only where desc_act is set", f"{_Q}/gptq/schemes, process_weights_after_loading"),
)  # fmt: skip
"""What this replay knows of SGLang, and where it is written."""

PACKED: Packed = {**JOINED, **DELTA}
SKIPPED = (".bias", "_bias", ".k_scale", "_k_scale", ".v_scale", "_v_scale", "_weight_scale", "_input_scale")


def replay(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], version: str = VERSION) -> list[Load]:
    """What SGLang does with a checkpoint; arguments and errors as in `vllm.replay`."""
    return loads_of(models_of(config, tensors, version), config, tensors)


def loads_of(models: Sequence[Model], config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> list[Load]:
    """Load models that were just built: files, and the names in each, in the order in which they are opened there."""
    ordered = sorted(tensors.values(), key=lambda entry: (entry.file, entry.name))
    return [load(model, ordered) for model in models]


def models_of(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], version: str = VERSION) -> list[Model]:
    """The models that SGLang builds from a folder."""
    facts, container = VERSIONS[version], container_for(config)
    try:
        decider = decider_of(config.get("quantization_config"), facts.weight_only_nvfp4, facts.heads_by_layers)
    except Stop as stop:
        return [refused_model("SGLang", stop)]
    found = [_main(config, is_conditional(config), decider, container)]
    return [*found, _head(config, decider, container, facts)] if any("mtp" in name for name in tensors) else found


def _main(config: Mapping[str, Any], conditional: bool, decider: Decider, container: Container | None) -> Model:
    prefix = "model.language_model." if conditional else "model."
    claims = decoder_claims(config, prefix) + (tower_claims(config) if conditional else [])
    modules = modules_of(claims, Naming(lambda module: module, _path, unquantized=_plain))
    moe, kind = "Moe" if read_geometry(config).moe else "", "ConditionalGeneration" if conditional else "CausalLM"
    model = build(f"Qwen3_5{moe}For{kind}", modules, lambda module: decider.scheme(module, PACKED), container)
    model.place = _Placing(model, config, main=True, conditional=conditional, switches=True)
    return model


def _head(config: Mapping[str, Any], decider: Decider, container: Container | None, facts: Version) -> Model:
    """The head; embedding and output head are the main model's."""
    claims: list[Claim] = head_claims(config, 1)
    modules = modules_of(claims, Naming(lambda module: module, _head_path, unquantized=_plain))
    packed = PACKED if facts.head_knows_members else {}
    model = build("Qwen3_5ForCausalLMMTP", modules, lambda module: decider.scheme(module, packed), container)
    model.place = _Placing(
        model, config, main=False, conditional=True, switches=facts.head_switches, members=facts.head_knows_members
    )
    return model


def _plain(module: str) -> bool:
    return (
        module.endswith(("mlp.gate", "mlp.shared_expert_gate", "linear_attn.conv1d"))
        or ".visual." in module
        or module == "mtp.fc"
    )


def _path(module: str) -> str:
    plain = module.replace("model.language_model.", "model.").replace(".self_attn", "").replace("model.visual.", "visual.")
    return plain.replace("attn.qkv", "attn.qkv_proj") if plain.startswith("visual.") else plain


def _head_path(module: str) -> str:
    inside = module.replace("mtp.", "model.").replace(".self_attn", "")
    return inside.removeprefix("model.") if inside.startswith(("model.fc", "model.pre_fc")) else inside


class _Placing:
    """What becomes of stored tensors in one model; it remembers whether fused experts have been seen."""

    def __init__(
        self, model: Model, config: Mapping[str, Any], *, main: bool, conditional: bool, switches: bool, members: bool = True
    ) -> None:
        self.model, self.main, self.conditional, self.switches, self.members = model, main, conditional, switches, members
        self.method = (config.get("quantization_config") or {}).get("quant_method", "")
        self.experts, self.tied = read_geometry(config).experts, read_geometry(config).tied
        self.index, self.fused_seen = Index(model), False

    def __call__(self, name: str, shape: tuple[int, ...]) -> Placed | list[Into]:
        if dropped := self._left_out(name):
            return dropped
        known = name if self.conditional or not self.main else re.sub(r"^model\.language_model\.", "\0", name)
        if stacked := STACKED.match(known):
            self.fused_seen = self.fused_seen or self.switches
            if stacked["holder"] in self.index.holders:
                return self._all_experts(stacked, name, shape)
        if EXPERT.match(known) and self.fused_seen:
            holder = self.index.holders.get(known.partition(".mlp.experts.")[0] + ".mlp.experts")
            why = "an earlier tensor held fused experts, and from there on only such are looked for"
            return Dropped(why, rule="fused-for-good", module=holder.asked if holder else "")
        found = self.index.find(known)
        return self._unknown(known) if found is None else self._one(found, name)

    def _left_out(self, name: str) -> Dropped | None:
        if "rotary_emb.inv_freq" in name:
            return Dropped("positions are computed", True)
        if CACHE_SCALE.search(name):
            return Dropped("it goes to the quantized cache, where there is one", True)
        if self.main and "mtp" in name:
            return Dropped("the main model leaves the MTP head to the drafting one", True)
        if not self.main and "mtp" not in name:
            return Dropped("the drafting model takes nothing of the trunk", True)
        if name.endswith(".g_idx"):
            return Dropped("orders of columns are read only where desc_act is set", True, "order")
        if self.main and self.tied and name.startswith("lm_head."):
            return Dropped("the head is the embedding", True)
        if self.main and not self.conditional and ".visual." in name:
            return Dropped("a text-only model has no tower", True)
        return None

    def _one(self, found: Found, name: str) -> Placed:
        module = found.module
        if dropped := self.index.left(module):
            return dropped
        if room := self.index.room(found):
            return room
        why = f"{module.asked} is built {self.model.built(module)} and has no {found.suffix!r}"
        if module.kind == "experts" and self.main and not f"_{found.suffix}".endswith(SKIPPED):
            rule = self._rule_of(module, self.model.schemes[module.asked])
            return Refused(name, why, rule if rule == "gptq-experts" else "experts-strict", module.asked)
        return Dropped(why, rule=self._rule_of(module, self.model.schemes[module.asked]), module=module.asked)

    def _rule_of(self, module: Module, built: Built | None) -> str:
        """Why a module is built otherwise than it is stored."""
        if module.kind == "experts" and built is not None and self.method == "gptq":
            return "gptq-experts"
        if (
            not self.main
            and module.kind == "linear"
            and module.fused
            and not self.members
            and self.method == "compressed-tensors"
        ):
            return "head-members"
        if module.asked == "mtp.fc":
            return "head-fc"
        return "lenient" if self.main else "head-skips"

    def _all_experts(self, stacked: re.Match[str], name: str, shape: tuple[int, ...]) -> Placed | list[Into]:
        module = self.index.holders[stacked["holder"]]
        left = self.index.left(module)
        found = None if left else self.index.all_experts(module, stacked["leaf"], stacked["suffix"] or "", shape)
        if isinstance(found, Into):
            return found
        if found is None:
            why = f"{module.asked} is built quantized and has no weight for fused experts"
            lenient = Dropped(why, rule="lenient", module=module.asked)
            return lenient if self.main else Refused(name, why, "head-skips", module.asked)
        return Refused(name, f"is {list(shape)}, {list(found)} is what config.json says", "experts-strict", module.asked)

    def _unknown(self, known: str) -> Placed:
        if (expert := EXPERT.match(known)) and expert["holder"] in self.index.holders:
            return Dropped(f"config.json says {self.experts} experts", rule="experts-beyond")
        if known.startswith("mtp.layers.") and not known.startswith("mtp.layers.0."):
            return Dropped("the head has one layer", rule="head-one-layer")
        return Dropped("no parameter has this name", rule="lenient" if self.conditional else "text-names")
