"""How transformers 5.23 loads a Qwen3.5, with what it asks of compressed-tensors 0.20, GPTQModel and auto-round.

It joins nothing but experts. It looks for files before it looks at names: a `model.safetensors` is the whole model to it, whatever an index beside it says, unless config.json names the index as
`transformers_weights`. What it does not find is filled with random numbers, and listed in a loading report. The MTP head is left out by design.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwench.checkpoint.folder import INDEX_NAME
from qwench.checkpoint.source import TensorEntry
from qwench.formats import Container
from qwench.loading.network import Naming, decoder_claims, leaves, modules_of, tower_claims
from qwench.loading.parameters import HALVES, parameter_name, part_key
from qwench.loading.parts import Dropped, Into, Load, Model, Module, Placed, Refused, Rule
from qwench.loading.patterns import renamed
from qwench.loading.replay import Stop, build, container_for, load
from qwench.loading.vllm import EXPERT, STACKED, TEXT_PREFIXES, is_conditional
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
    Rule("ct-single-experts", "of a compressed-tensors file, unquantized experts stored one by one are not joined", f"{_P}/conversion_mapping.py, with quantizers/quantizer_compressed_tensors.py"),
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
    """The one model that transformers builds."""
    conditional, container = is_conditional(config), container_for(config)
    claims = decoder_claims(config, "model.language_model." if conditional else "model.") + (
        tower_claims(config) if conditional else []
    )
    modules = modules_of(claims, Naming(lambda module: module, lambda module: module, fuses=False))
    moe, kind = "Moe" if read_geometry(config).moe else "", "ConditionalGeneration" if conditional else "CausalLM"
    model = build(f"Qwen3_5{moe}For{kind}", modules, lambda module: _scheme(module, config, container), container)
    model.place = _Placing(model, config, conditional, container)
    return [model]


def _scheme(module: Module, config: Mapping[str, Any], container: Container | None) -> Scheme | None:
    """As the container's own library decides, by the checkpoint's names."""
    if container is None:
        return None
    scheme = container.scheme_of(config["quantization_config"], module.members[0].stored)
    if scheme is not None and not scheme.symmetric and container.METHOD == "compressed-tensors":
        raise Stop("asymmetric integers are not read", "asymmetric")
    return scheme


class _Placing:
    """What becomes of stored tensors."""

    def __init__(self, model: Model, config: Mapping[str, Any], conditional: bool, container: Container | None) -> None:
        self.model, self.conditional, self.method = model, conditional, container.METHOD if container else ""
        self.at = {member.stored: (module, member) for module, member in leaves(model.modules)}
        self.holders = {
            m.stored.partition(".mlp.experts.")[0] + ".mlp.experts": module
            for module, m in leaves(model.modules)
            if m.expert is not None
        }
        self.refused = {refusal.where for refusal in model.refusals}
        self.tied = read_geometry(config).tied

    def __call__(self, name: str, shape: tuple[int, ...]) -> Placed | list[Into]:
        if re.match(r"^mtp\.", name):
            return Dropped("transformers has no MTP head", True, "head-ignored")
        if name.endswith(".g_idx") or (self.tied and name.startswith("lm_head.")):
            return Dropped("not needed", True)
        if not self.conditional and name.startswith("model.visual."):
            return Dropped("a text-only model has no tower", True, "text-prefix")
        known = name if self.conditional else renamed(name, TEXT_PREFIXES)
        if (stacked := STACKED.match(known)) and stacked["holder"] in self.holders:
            return self._all_experts(self.holders[stacked["holder"]], stacked["leaf"], name, shape)
        found = self.at.get(known) or self.at.get(known.rpartition(".")[0])
        if found is None:
            return Dropped("no parameter has this name", rule="report")
        module, member = found
        suffix = "" if known in self.at else known.rpartition(".")[2]
        if module.asked in self.refused:
            return Dropped(f"{module.asked} is refused", module=module.asked)
        if suffix in module.extras:
            return Into(f"{module.path}.{suffix}", ("",))
        if (
            EXPERT.match(known)
            and suffix == "weight"
            and self.method == "compressed-tensors"
            and self.model.schemes[module.asked] is None
        ):
            return Dropped(
                "unquantized experts that are stored one by one are not joined", rule="ct-single-experts", module=module.asked
            )
        parameter = self.model.parameters.get(parameter_name(module, member.leaf, suffix))
        if parameter is not None:
            return Into(parameter.name, (part_key(module, member, suffix),))
        return Dropped("no parameter has this name", rule="report", module=module.asked)

    def _all_experts(self, module: Module, leaf: str, name: str, shape: tuple[int, ...]) -> Placed | list[Into]:
        wanted = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        parameter = self.model.parameters.get(f"{module.path}.{HALVES[wanted[0]]}_weight")
        if self.method in ("gptq", "auto-round"):
            return Dropped(
                "experts are taken apart before loading, and this tensor holds them all",
                rule="split-experts",
                module=module.asked,
            )
        if parameter is None:
            return Dropped("the experts are built quantized", rule="report", module=module.asked)
        rows, columns = next(m.shape for m in module.members if m.leaf == wanted[0])
        expected = (len({m.expert for m in module.members}), rows * len(wanted), columns)
        if shape != expected:
            return Refused(name, f"is {list(shape)}, {list(expected)} is what config.json says", "report", module.asked)
        return Into(parameter.name, tuple(key for key in parameter.parts if key.rpartition(".")[2] in wanted), whole=True)
