"""How vLLM 0.32 loads a Qwen3.5: its rules as a table, and the two models that it builds.

Two networks are loaded from the same files: the main model, and the MTP head where it is to draft. Each walks all tensors and takes its own. Names are rewritten (prefixes, then joined
modules), and a name that is left over is an error, unless it ends in `.bias` or names the scale of a quantized cache. What it does not notice: a parameter that nothing filled, where the
checkpoint is quantized; experts beyond the number in the config; global scales that differ within a joined module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwench.checkpoint.source import TensorEntry
from qwench.formats import Container
from qwench.loading.network import Naming, decoder_claims, head_claims, modules_of, tower_claims
from qwench.loading.parts import Dropped, Into, Load, Model, Place, Placed, Refused, Rule, Stop, refused_model
from qwench.loading.patterns import renamed
from qwench.loading.placing import CACHE_SCALE, EXPERT, STACKED, Found, Index
from qwench.loading.replay import build, container_for, load
from qwench.loading.vllm_others import Packed
from qwench.loading.vllm_schemes import Decider, decider_of
from qwench.models.geometry import read_geometry, text_config

VERSION = "0.32"
_MODELS, _QUANT = "vllm/model_executor/models", "vllm/model_executor/layers/quantization"

RULES = (
    Rule(
        "prefixes", "model.visual. -> visual., model.language_model. -> language_model.model., lm_head. -> language_model.lm_head.",
        f"{_MODELS}/qwen3_vl.py, Qwen3VLForConditionalGeneration.hf_to_vllm_mapper",
    ),
    Rule("text-prefix", "a text-only model strips model.language_model. to model.", f"{_MODELS}/qwen3_5.py, Qwen3_5ForCausalLMBase.hf_to_vllm_mapper"),
    Rule("text-positions", "a text-only model's positions have one row, its drafting head's three where the config has M-RoPE keys (seen on a CPU)", "vllm/config/model.py, with vllm/v1/spec_decode"),
    Rule("main-skips-head", "the main model drops every tensor under mtp.", f"{_MODELS}/qwen3_5.py, hf_to_vllm_mapper of each class"),
    Rule("joined", "q/k/v, gate/up, in_proj_qkv/z and in_proj_b/a become one module each", f"{_MODELS}/qwen3_5.py, Qwen3_5Model.hf_to_vllm_mapper"),
    Rule("strict", "a name that no module or parameter has is an error", f"{_MODELS}/utils.py, AutoWeightsLoader._load_module"),
    Rule("lenient-suffixes", "unknown .bias, .[qkv]_scale and .[qkv]_zero_point are skipped", f"{_MODELS}/utils.py, AutoWeightsLoader.load_weights"),
    Rule("no-order", "every .g_idx is dropped where the checkpoint is quantized", f"{_QUANT}/base_config.py, get_checkpoint_weight_mapper"),
    Rule("tied", "lm_head is skipped where it is tied to the embedding", f"{_MODELS}/utils.py, AutoWeightsLoader._filter_skipped"),
    Rule("experts", "experts fill w13_* and w2_*, from one tensor of all or one by one", "vllm/model_executor/layers/fused_moe/routed_experts.py, RoutedExperts.load_weights"),
    Rule("experts-beyond", "experts whose number is not below num_experts are skipped without a word", "vllm/model_executor/layers/fused_moe/routed_experts.py, RoutedExperts.load_weights"),
    Rule("router-plain", "router and shared_expert_gate are built unquantized", f"{_MODELS}/qwen3_next.py, Qwen3NextSparseMoeBlock.__init__"),
    Rule("head-names", "the drafting model takes mtp.*, embed_tokens and lm_head", f"{_MODELS}/qwen3_5_mtp.py, Qwen3_5MTP.load_weights"),
    Rule("head-fc", "mtp.fc is quantized like any other layer", f"{_MODELS}/qwen3_5_mtp.py, Qwen3_5MultiTokenPredictor.__init__"),
    Rule("head-bare-gptq", "a -: pattern of `dynamic` that holds `mtp` leaves the head's layers unquantized", f"{_MODELS}/qwen3_5_mtp.py, Qwen3_5MultiTokenPredictor.__init__"),
    Rule("head-experts", "the head has as many experts as the trunk (num_experts)", f"{_MODELS}/qwen3_next.py, Qwen3NextSparseMoeBlock.__init__"),
    Rule("names-renamed", "exact names in `ignore` and `targets` are renamed like tensors, patterns are not", f"{_QUANT}/compressed_tensors/compressed_tensors.py, apply_vllm_mapper"),
    Rule("ct-ignore-all-or-none", "`ignore` must name all members of a joined module or none", f"{_QUANT}/compressed_tensors/utils.py, should_ignore_layer"),
    Rule("ct-targets", "name, then all members of a joined module, then the class that is contained", f"{_QUANT}/compressed_tensors/utils.py, find_matched_target"),
    Rule("ct-experts-one-scheme", "expert 0 speaks for the experts of a layer", f"{_QUANT}/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe.py, get_moe_method"),
    Rule("ct-fp8-blocks", "blocks must divide the rows of all that is joined but the last, and the width of experts", f"{_QUANT}/utils/fp8_utils.py, validate_fp8_block_shape, validate_fp8_block_shape_moe"),
    Rule("ct-experts-methods", "experts in FP8 have a scale for each row and token, one scale and a stored one, or blocks; in INT8 a scale for each row and token", f"{_QUANT}/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe.py, get_moe_method"),
    Rule("ct-no-activation-order", "activation order by group is refused", f"{_QUANT}/compressed_tensors/compressed_tensors.py, _quantization_scheme_map_from_config"),
    Rule("nvfp4-largest-global", "of the global scales of a joined module the largest is taken", f"{_QUANT}/compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py, process_weights_after_loading"),
    Rule("gptq-dynamic", "patterns of `dynamic` are matched from the beginning of vLLM's names, of joined modules the joined one", f"{_QUANT}/utils/gptq_utils.py, get_dynamic_override"),
    Rule("gptq-all-or-none", "headers say which layers have integers; all members of a joined module or none", f"{_QUANT}/utils/gptq_utils.py, is_layer_gptq_quantized"),
    Rule("gptq-no-desc-act", "desc_act is refused", f"{_QUANT}/utils/gptq_utils.py, normalize_and_validate_gptq_desc_act"),
    Rule("gptq-numbers", "symmetric 4 and 8 bits", f"{_QUANT}/auto_gptq.py, AutoGPTQConfig.TYPE_MAP"),
    Rule("inc-keys", "extra_config by exact name, by suffix, by members, by expression; stacks decide the rest", f"{_QUANT}/inc/config_parser.py, INCConfigParser._resolve_raw"),
    Rule("inc-all-or-none", "members of a joined module must have the same numbers", f"{_QUANT}/inc/config_parser.py, INCConfigParser._resolve_raw"),
    Rule("cache-scales", "scales of a quantized cache go to the attention, or are skipped", f"{_QUANT}/base_config.py, get_cache_scale_mapper"),
    Rule("fp8-config", "an activation scheme, and blocks of two numbers with dynamic inputs", f"{_QUANT}/fp8.py, Fp8Config.from_config"),
    Rule("fp8-all-or-none", "`modules_to_not_convert` means exact names: of a joined module its own or all members'", f"{_QUANT}/utils/quant_utils.py, is_layer_skipped"),
    Rule("fp8-blocks", "the scales of a joined module have ceil(rows / block) rows, and each member's begin at ceil(rows before / block); experts must be cut evenly", f"{_QUANT}/fp8.py, Fp8LinearMethod.create_weights, Fp8MoEMethod.create_weights"),
    Rule("awq-config", "4 bits, with group_size and zero_point said", f"{_QUANT}/auto_awq.py, AutoAWQConfig.from_config"),
    Rule("awq-all-or-none", "`modules_to_not_convert` means any part of a name: of a joined module's name, or of all members'; an empty list is filled from the headers", f"{_QUANT}/auto_awq.py, AutoAWQConfig.get_quant_method, maybe_update_config"),
    Rule("modelopt-config", "quant_algo and its companions", f"{_QUANT}/modelopt.py, ModelOptQuantConfigBase.from_config; transformers_utils/model_arch_config_convertor.py"),
    Rule("modelopt-all-or-none", "excluded modules by exact name, by any part of a name, by wildcard; members of joined modules alike", f"{_QUANT}/modelopt.py, is_layer_excluded, _resolve_quant_algo"),
    Rule("modelopt-head-fc", "mtp.fc of an NVFP4 file is built unquantized", f"{_MODELS}/qwen3_5_mtp.py, Qwen3_5MultiTokenPredictor.__init__"),
    Rule("modelopt-largest-scale", "of weight_scale_2 of a joined module the largest is taken, of experts the gate's", f"{_QUANT}/modelopt.py, KNvfp4Static.process, ModelOptNvFp4FusedMoE.process_weights_after_loading"),
    Rule("cast", "a tensor of the right shape is copied whatever its dtype, with a warning at most", f"{_MODELS}/utils.py, AutoWeightsLoader._load_param"),
    Rule("inc-numbers", "asymmetric integers have no kernel", f"{_QUANT}/inc/schemes/inc_wna16_scheme.py, get_linear_method"),
)  # fmt: skip
"""What this replay knows of vLLM, and where it is written."""

PREFIXES = {"model.visual.": "visual.", "lm_head.": "language_model.lm_head.", "model.language_model.": "language_model.model."}
TEXT_PREFIXES = {"model.language_model.": "model."}
JOINED: Packed = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
DELTA: Packed = {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")}
PACKED: dict[str, Packed] = {"conditional": {**JOINED, "qkv": ("qkv",), **DELTA}, "text": {**JOINED, **DELTA}, "mtp": JOINED}
"""`packed_modules_mapping` of each class."""

LENIENT = (".bias", ".q_scale", ".k_scale", ".v_scale", ".q_zero_point", ".k_zero_point", ".v_zero_point")
ROTARY = ("rotary_pos_emb.inv_freq", "rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def replay(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> list[Load]:
    """What vLLM does with a checkpoint: the main model, and the MTP head where one is stored.

    Raises:
        CheckpointError: a config without the numbers of a Qwen3.5, or a quantization method that this table does not know.
    """
    return loads_of(models_of(config, tensors), config, tensors)


def loads_of(models: Sequence[Model], config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> list[Load]:
    """Load models that were just built; what they are filled with stays in them."""
    return [load(model, tensors.values()) for model in models]


def models_of(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> list[Model]:
    """The models that vLLM builds from a folder."""
    conditional = is_conditional(config)
    prefixes = PREFIXES if conditional else TEXT_PREFIXES
    quantization, container = config.get("quantization_config"), container_for(config)
    integers = [name.rpartition(".")[0] for name, entry in tensors.items() if entry.dtype not in ("F16", "BF16", "F32")]
    plain = sorted({name.rpartition(".")[0] for name in tensors} - set(integers))
    try:
        main, head = (decider_of(quantization, prefixes, integers, mtp, plain) for mtp in (False, True))
    except Stop as stop:
        return [refused_model("vLLM", stop)]
    found = [_main(config, conditional, main, container)]
    return [*found, _head(config, head, container)] if any(name.startswith("mtp.") for name in tensors) else found


def is_conditional(config: Mapping[str, Any]) -> bool:
    """Whether the config asks for the class with a tower."""
    return any("ConditionalGeneration" in name for name in config.get("architectures") or ("ConditionalGeneration",))


def _main(config: Mapping[str, Any], conditional: bool, decider: Decider, container: Container | None) -> Model:
    prefix = "model.language_model." if conditional else "model."
    claims = decoder_claims(config, prefix) + (tower_claims(config) if conditional else [])
    packed = PACKED["conditional" if conditional else "text"]
    moe, kind = "Moe" if read_geometry(config).moe else "", "ConditionalGeneration" if conditional else "CausalLM"

    def asked(module: str) -> str:
        return renamed(f"{module}.", PREFIXES).removesuffix(".") if conditional else module

    modules = modules_of(claims, Naming(asked, lambda module: _routed(asked(module))))
    model = build(f"Qwen3_5{moe}For{kind}", modules, lambda module: decider.scheme(module, packed), container)
    model.place = _place(
        model, config, lambda name: name if conditional else renamed(name, TEXT_PREFIXES), _Drops(config, main=True)
    )
    return model


def _head(config: Mapping[str, Any], decider: Decider, container: Container | None) -> Model:
    layers = text_config(config).get("mtp_num_hidden_layers") or 1
    shared = [claim for claim in decoder_claims(config, "model.") if claim.tensor.startswith(("model.embed_tokens", "lm_head"))]
    modules = modules_of(
        [*shared, *head_claims(config, layers)], Naming(lambda module: module, lambda module: _routed(_inside(module)))
    )
    moe = "Moe" if read_geometry(config).moe else ""
    model = build(f"Qwen3_5{moe}MTP", modules, lambda module: decider.scheme(module, JOINED), container)
    model.place = _place(model, config, _embedding, _Drops(config, main=False))
    return model


def _routed(module: str) -> str:
    """Where the parameters of experts lie, below the module that runs them."""
    return module.replace(".mlp.experts", ".mlp.experts.routed_experts")


def _inside(module: str) -> str:
    """The head's modules inside of its class."""
    return re.sub(r"^mtp\.", "model.", module)


def _embedding(name: str) -> str:
    return name.replace("language_model.", "") if "embed_tokens" in name else name


class _Drops:
    """What a model leaves out before it looks for a place."""

    def __init__(self, config: Mapping[str, Any], main: bool) -> None:
        self.main, self.tied = main, read_geometry(config).tied
        self.quantized = bool(config.get("quantization_config"))

    def __call__(self, name: str) -> Dropped | None:
        mine = name.startswith("mtp.")
        if self.main and mine:
            return Dropped("the main model leaves the MTP head to the drafting one", True, "main-skips-head")
        if not self.main and not mine and not any(part in name for part in ("embed_tokens", "lm_head")):
            return Dropped("the drafting model takes nothing of the trunk but embedding and head", True, "head-names")
        if any(part in name for part in ROTARY):
            return Dropped("positions are computed", True, "strict")
        if self.quantized and CACHE_SCALE.search(name):
            return Dropped("it goes to the quantized cache, where there is one", True, "cache-scales")
        if self.quantized and name.endswith(".g_idx"):
            return Dropped("orders of columns are not read", True, "no-order")
        if self.tied and name.startswith("lm_head."):
            return Dropped("the head is the embedding", True, "tied")
        return None


def _place(model: Model, config: Mapping[str, Any], canonical: Callable[[str], str], drops: _Drops) -> Place:
    """The function that finds a place for a stored tensor; `canonical` gives it the name that the modules were described with."""
    index, experts = Index(model), read_geometry(config).experts

    def place(name: str, shape: tuple[int, ...]) -> Placed | list[Into]:
        if dropped := drops(name):
            return dropped
        known = canonical(name)
        if (stacked := STACKED.match(known)) and stacked["holder"] in index.holders:
            return _all_experts(index, stacked, name, shape)
        found = index.find(known)
        return _unknown(name, known, index, experts) if found is None else _one(index, found, name)

    return place


def _one(index: Index, found: Found, name: str) -> Placed:
    """A tensor of one member."""
    if dropped := index.left(found.module, "strict"):
        return dropped
    if room := index.room(found):
        return room
    if name.endswith(LENIENT) and found.module.kind != "experts":
        return Dropped("there is no such parameter, and names that end so are skipped", rule="lenient-suffixes")
    built = index.model.built(found.module)
    return Refused(name, f"{found.module.asked} is built {built} and has no {found.suffix!r}", "strict", found.module.asked)


def _all_experts(index: Index, stacked: re.Match[str], name: str, shape: tuple[int, ...]) -> Placed | list[Into]:
    """One tensor of all experts."""
    module, suffix = index.holders[stacked["holder"]], stacked["suffix"] or ""
    if dropped := index.left(module, "experts"):
        return dropped
    found = index.all_experts(module, stacked["leaf"], suffix, shape)
    if isinstance(found, Into):
        return found
    if found is None:
        return Refused(
            name, f"{module.asked} is built {index.model.built(module)} and has no weight{suffix}", "experts", module.asked
        )
    return Refused(name, f"is {list(shape)}, {list(found)} is what config.json says", "experts", module.asked)


def _unknown(name: str, known: str, index: Index, experts: int) -> Placed:
    """A name that no module has."""
    if (expert := EXPERT.match(known)) and expert["holder"] in index.holders:
        beyond = int(expert["number"]) >= experts
        why = f"config.json says {experts} experts" if beyond else "experts have no such projection"
        return Dropped(why, rule="experts-beyond")
    if name.endswith(LENIENT):
        return Dropped("there is no such parameter, and names that end so are skipped", rule="lenient-suffixes")
    return Refused(name, "no module or parameter has this name", "strict")
