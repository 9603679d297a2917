"""How transformers 5.23 loads a Qwen3.5, with what it asks of compressed-tensors 0.20, GPTQModel and auto-round.

It joins nothing but experts. It looks for files before it looks at names: a `model.safetensors` is the whole model to it, whatever an index beside it says, unless config.json names the index as
`transformers_weights`. What it does not find is filled with random numbers, and listed in a loading report. The MTP head is left out by design.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwench.checkpoint.folder import INDEX_NAME
from qwench.checkpoint.source import TensorEntry
from qwench.formats import Container
from qwench.formats.compressed_tensors import STORED_SCALE
from qwench.loading.network import Naming, decoder_claims, modules_of, tower_claims
from qwench.loading.parts import Dropped, Into, Load, Model, Module, Placed, Refused, Rule, Stop
from qwench.loading.patterns import renamed
from qwench.loading.placing import CACHE_SCALE, EXPERT, STACKED, Found, Index
from qwench.loading.reading import reading
from qwench.loading.replay import Scheming, build, container_for, load
from qwench.loading.transformers_others import Converting
from qwench.loading.vllm import TEXT_PREFIXES, is_conditional
from qwench.models.geometry import read_geometry
from qwench.numerics import Scheme

VERSION = "5.23"
SINGLE = "model.safetensors"
_P = "src/transformers"

RULES = (
    Rule("one-file", "model.safetensors goes before an index; only `transformers_weights` in config.json changes that", f"{_P}/modeling_utils.py, _get_resolved_checkpoint_files"),
    Rule("head-ignored", "tensors under mtp. are expected to be unexpected", f"{_P}/models/qwen3_5/modeling_qwen3_5.py, _keys_to_ignore_on_load_unexpected"),
    Rule("text-prefix", "a text-only model strips language_model. and leaves model.visual. alone", f"{_P}/conversion_mapping.py, qwen3_5_text"),
    Rule("report", "a name that no parameter has is skipped and reported; a parameter without a tensor is filled with random numbers and reported", f"{_P}/modeling_utils.py, _finalize_model_loading"),
    Rule("nvfp4-experts", "NVFP4 experts are decoded without their global scale", f"{_P}/integrations/compressed_tensors.py, CompressedTensorsDequantize.convert"),
    Rule("asymmetric", "asymmetric integers are refused with compressed-tensors 0.20", f"{_P}/integrations/compressed_tensors.py, with compressed_tensors/compressors"),
    Rule("ct-experts-decoded", "FP8 experts are decoded with one scale or one for each row, packed ones by their library, and no others", f"{_P}/integrations/compressed_tensors.py, CompressedTensorsDequantize.convert"),
    Rule("ct-experts-inputs", "experts' inputs are not rounded", f"{_P}/integrations/compressed_tensors.py, CompressedTensorsDequantize"),
    Rule("ct-single-experts", "of a compressed-tensors file, unquantized experts stored one by one are not joined", f"{_P}/conversion_mapping.py, with quantizers/quantizer_compressed_tensors.py"),
    Rule("fp8-list", "modules_to_not_convert: an expression from the beginning of a name to the end of a component, or the end of a name", f"{_P}/quantizers/quantizers_utils.py, should_convert_module"),
    Rule("awq-no-experts", "AWQ replaces layers of class Linear alone: quantized experts find no parameter", f"{_P}/integrations/awq.py, replace_with_awq_linear"),
    Rule("awq-float16", "on a GPU an AWQ file is computed in float16", f"{_P}/quantizers/quantizer_awq.py, AwqQuantizer.update_dtype"),
    Rule("unknown-method", "a method that it does not know is skipped with a warning, and the file loaded as if unquantized", f"{_P}/quantizers/auto.py, AutoHfQuantizer.supports_quant_method"),
    Rule("split-experts", "GPTQModel and auto-round take experts apart before loading: kept experts in one tensor are not found", f"{_P}/quantizers/quantizer_gptq.py, quantizer_auto_round.py"),
)  # fmt: skip
"""What this replay knows of transformers, and where it is written."""


def replay(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> list[Load]:
    """What transformers does with a checkpoint; arguments and errors as in `vllm.replay`."""
    return loads_of(models_of(config, tensors), config, tensors)


def loads_of(models: Sequence[Model], config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> list[Load]:
    """Load the model that was just built, from the files that are opened."""
    (model,) = models
    opened = seen(config, tensors)
    made = load(model, opened.values())
    unseen = Dropped(f"{SINGLE} is taken for the whole model, and this tensor lies in another file", rule="one-file")
    made.dropped = {name: unseen for name in tensors.keys() - opened.keys() if not name.startswith("mtp.")} | made.dropped
    return [made]


def seen(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Mapping[str, TensorEntry]:
    """The tensors of the files that are opened."""
    files = {entry.file for entry in tensors.values()}
    if SINGLE not in files or len(files) == 1 or config.get("transformers_weights") == INDEX_NAME:
        return tensors
    return {name: entry for name, entry in tensors.items() if entry.file == SINGLE}


def models_of(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> list[Model]:
    """The one model that transformers builds. A file in a method that it does not know is taken for an unquantized one (see `reading`)."""
    conditional, container = is_conditional(config), container_for(config)
    claims = decoder_claims(config, "model.language_model." if conditional else "model.") + (
        tower_claims(config) if conditional else []
    )
    scheming, naming = _scheming(config, container), Naming(lambda module: module, lambda module: module, fuses=False)
    if container is None:
        naming = replace(naming, unquantized=lambda module: module.endswith("mlp.gate"))
    moe, kind = "Moe" if read_geometry(config).moe else "", "ConditionalGeneration" if conditional else "CausalLM"
    model = build(f"Qwen3_5{moe}For{kind}", modules_of(claims, naming), scheming, container)
    model.place = _Placing(model, config, conditional, container)
    return [model]


def _scheming(config: Mapping[str, Any], container: Container | None) -> Scheming:
    """As the container's own library decides, or transformers' own reader, by the checkpoint's names."""
    quantization = config.get("quantization_config")
    if container is not None:
        return lambda module: _scheme(module, config, container)
    if quantization and reading("transformers", config) == "replayed":
        return Converting(quantization, {} if is_conditional(config) else TEXT_PREFIXES).scheme
    return lambda module: None


def _scheme(module: Module, config: Mapping[str, Any], container: Container) -> Scheme | None:
    scheme = container.scheme_of(config["quantization_config"], module.members[0].stored)
    if scheme is None or container.METHOD != "compressed-tensors":
        return scheme
    if not scheme.symmetric:
        raise Stop("asymmetric integers are not read", "asymmetric")
    if module.kind != "experts":
        return scheme
    if scheme.block:
        raise Stop("experts in FP8 with scales of blocks are not decoded", "ct-experts-decoded")
    if scheme.activations == "int8":
        raise Stop("experts in integers one to a byte are not decoded", "ct-experts-decoded")
    return replace(scheme, activations="none") if scheme.kind == "fp8" else scheme  # they read their inputs as they are


class _Placing:
    """What becomes of stored tensors."""

    def __init__(self, model: Model, config: Mapping[str, Any], conditional: bool, container: Container | None) -> None:
        self.model, self.conditional, self.method = model, conditional, container.METHOD if container else ""
        self.index, self.tied = Index(model), read_geometry(config).tied

    def __call__(self, name: str, shape: tuple[int, ...]) -> Placed | list[Into]:
        if re.match(r"^mtp\.", name):
            return Dropped("transformers has no MTP head", True, "head-ignored")
        if name.endswith(".g_idx") or (self.tied and name.startswith("lm_head.")):
            return Dropped("not needed", True)
        if CACHE_SCALE.search(name):
            return Dropped("there is no quantized cache", True)
        if not self.conditional and name.startswith("model.visual."):
            return Dropped("a text-only model has no tower", True, "text-prefix")
        known = name if self.conditional else renamed(name, TEXT_PREFIXES)
        if (stacked := STACKED.match(known)) and stacked["holder"] in self.index.holders:
            return self._all_experts(stacked, name, shape)
        found = self.index.find(known)
        return Dropped("no parameter has this name", rule="report") if found is None else self._one(found, known)

    def _one(self, found: Found, known: str) -> Placed:
        module = found.module
        if dropped := self.index.left(module):
            return dropped
        plain = found.suffix == "weight" and self.model.schemes[module.asked] is None
        if plain and EXPERT.match(known) and self.method == "compressed-tensors":
            why = "unquantized experts that are stored one by one are not joined"
            return Dropped(why, rule="ct-single-experts", module=module.asked)
        if module.kind == "experts" and found.suffix == STORED_SCALE:
            return Dropped("experts' inputs are not rounded", rule="ct-experts-inputs", module=module.asked)
        rule = "awq-no-experts" if found.suffix == "qweight" and module.kind == "experts" else "report"
        return self.index.room(found) or Dropped("no parameter has this name", rule=rule, module=module.asked)

    def _all_experts(self, stacked: re.Match[str], name: str, shape: tuple[int, ...]) -> Placed | list[Into]:
        module = self.index.holders[stacked["holder"]]
        if self.method in ("gptq", "auto-round"):
            why = "experts are taken apart before loading, and this tensor holds them all"
            return Dropped(why, rule="split-experts", module=module.asked)
        found = self.index.all_experts(module, stacked["leaf"], stacked["suffix"] or "", shape)
        if isinstance(found, Into):
            return found
        if found is None:
            return Dropped("the experts are built quantized", rule="report", module=module.asked)
        return Refused(name, f"is {list(shape)}, {list(found)} is what config.json says", "report", module.asked)
