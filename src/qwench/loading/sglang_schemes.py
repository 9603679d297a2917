"""How SGLang decides whether and how a module is quantized: `CompressedTensorsConfig`, `GPTQMarlinConfig`, `AutoRoundConfig`; for formats of other writers see `sglang_others`.

Its names of the trunk are those of the checkpoint, joined where it joins. What differs from vLLM: the class goes before the members of a joined module, a linear layer that nothing names is an
error, the experts of a GPTQ file are quantized whatever `dynamic` says, and headers are not asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwench.formats.gptq import read_numbers
from qwench.formats.quantization_config import read_group
from qwench.loading import eight_bits, sglang_others
from qwench.loading.modelopt import METHODS
from qwench.loading.parts import Module, Stop
from qwench.loading.patterns import (
    RE,
    agreeing,
    all_or_none,
    auto_round_numbers,
    auto_round_stacks,
    dynamic_of,
    entry_matches,
    first_match,
    gptq_checked,
    gptq_numbers,
    shard_names,
)
from qwench.loading.vllm_others import Packed
from qwench.loading.vllm_schemes import CLASSES, SPECIAL, Decider, chosen
from qwench.numerics import Scheme

EXPERTS_CLASS = "FusedMoE"


class CompressedTensors:
    """`get_scheme_dict`, `get_moe_scheme`, `get_lm_head_scheme`; `utils.should_ignore_layer`, `utils.find_matched_target`."""

    def __init__(self, config: Mapping[str, Any], weight_only_nvfp4: bool) -> None:
        self.config, self.weight_only_nvfp4 = config, weight_only_nvfp4
        self.ignore: Sequence[str] = config.get("ignore") or ()
        groups = config.get("config_groups") or {}
        self.groups: dict[str, Mapping[str, Any]] = {t: group for group in groups.values() for t in group.get("targets") or ()}

    def scheme(self, module: Module, packed: Packed) -> Scheme | None:
        if module.kind == "experts":
            found = [
                self._of(f"{module.asked}.0.{leaf}", EXPERTS_CLASS, packed) for leaf in ("gate_proj", "up_proj", "down_proj")
            ]
            if any(scheme != found[0] for scheme in found):
                raise Stop("gate, up and down of the experts are not in one scheme", "ct-experts-one-scheme")
            return self._served(found[0], module)
        if module.kind == "head":
            target = (
                None
                if self._ignored(module.asked, packed)
                else next((t for t in self.groups if self._means(module.asked, t)), None)
            )
            return self._served(read_group(self.groups[target], self.config, module.asked), module) if target else None
        return self._served(self._of(module.asked, CLASSES.get(module.leaf, "MergedColumnParallelLinear"), packed), module)

    def _served(self, scheme: Scheme | None, module: Module) -> Scheme | None:
        if scheme is not None and scheme.kind == "nvfp4" and scheme.activations == "none" and not self.weight_only_nvfp4:
            raise Stop("weight-only NVFP4 has no method", "ct-no-weight-only-nvfp4")
        if scheme is not None and scheme.block and scheme.activations == "none":
            raise Stop("weight-only FP8 in blocks has no method", "ct-no-weight-only-blocks")
        if scheme is not None and scheme.activations == "int8" and module.kind == "experts":
            raise Stop("experts in INT8 with INT8 inputs have a method on NPUs only", "ct-no-int8-experts")
        return eight_bits.checked(scheme, module)

    def _of(self, name: str, of_class: str, packed: Packed) -> Scheme | None:
        if self._ignored(name, packed):
            return None
        target = first_match(name, self.groups) or self._by_class(of_class) or self._by_members(name, packed)
        if target is None:
            raise Stop("no target means it, and `ignore` does not name it", "ct-named-or-refused")
        return read_group(self.groups[target], self.config, name)

    def _ignored(self, name: str, packed: Packed) -> bool:
        shards = [name] if name in self.ignore else shard_names(name, packed)
        found = [any(self._means(shard, entry) for entry in self.ignore) for shard in shards]
        return all_or_none(name, found, "in `ignore`", "ct-ignore-all-or-none")

    @staticmethod
    def _means(name: str, entry: str) -> bool:
        """A pattern from the beginning, else the name or the end of it."""
        return entry_matches(name, entry) if entry.startswith(RE) else name == entry or name.endswith(f".{entry}")

    def _by_class(self, of_class: str) -> str | None:
        if of_class == EXPERTS_CLASS:
            return first_match(of_class, self.groups, contained=True) or ("Linear" if "Linear" in self.groups else None)
        return first_match(of_class, self.groups, contained=True)

    def _by_members(self, name: str, packed: Packed) -> str | None:
        fused = next((key for key in packed if name.endswith(key)), None)
        hits = [first_match(name.replace(fused, member), self.groups) for member in packed[fused]] if fused else []
        return hits[0] if hits and all(hits) else None


class Gptq:
    """`GPTQMarlinConfig.get_quant_method`, `quantization/utils.get_linear_quant_method`: `dynamic` by SGLang's names, and not for experts."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.dynamic = config, config.get("dynamic") or {}
        gptq_checked(config, "Marlin reads")

    def scheme(self, module: Module, packed: Packed) -> Scheme | None:
        if module.kind == "head" and not self.config.get("lm_head", False):
            return None
        numbers = {} if module.kind == "experts" else dynamic_of(self.dynamic, module.asked)
        if numbers is None:
            return None
        return gptq_numbers({**self.config, **numbers}, module.asked, "Marlin reads")


class AutoRound:
    """`AutoRoundConfig.get_layer_config`: expressions must match the whole name; members of joined modules are always asked one by one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.extra: Mapping[str, Mapping[str, Any]] = config.get("extra_config") or {}
        self.stacks = tuple(auto_round_stacks(config))

    def scheme(self, module: Module, packed: Packed) -> Scheme | None:
        values = self._values(module, packed)
        return None if values["bits"] >= 16 else read_numbers({**values, "desc_act": False}, module.asked)

    def _values(self, module: Module, packed: Packed) -> dict[str, Any]:
        name = module.asked
        if name in self.extra:
            return self._numbers(name, True)
        quantized = name.startswith(self.stacks) if self.stacks else module.kind != "head"
        inside = [key for key in self.extra if key.startswith(name)] if module.kind == "experts" else []
        for fused, members in packed.items() if self.extra and not inside else ():
            if name.count(fused) == 1:
                inside = [name.replace(fused, member) for member in members]
                break
        return agreeing([self._numbers(key, quantized) for key in inside or [name]])

    def _numbers(self, name: str, quantized: bool) -> dict[str, Any]:
        entry = self.extra.get(name)
        if entry is None:
            entry = next((v for k, v in self.extra.items() if set(k) & SPECIAL and re.fullmatch(k, name)), {})
        return auto_round_numbers(self.config, entry, quantized)


def decider_of(config: Mapping[str, Any] | None, weight_only_nvfp4: bool, heads_by_layers: bool = True) -> Decider:
    """The decider of a quantization_config.

    Args:
        weight_only_nvfp4: whether NVFP4 without activations has a method.
        heads_by_layers: see `sglang_others.ModelOptDecider`.

    Raises:
        Stop: SGLang refuses the config as a whole.
        CheckpointError: a method that this table does not know.
    """
    quantization = config or {}
    return chosen(
        quantization,
        {
            "compressed-tensors": lambda: CompressedTensors(quantization, weight_only_nvfp4),
            "gptq": lambda: Gptq(quantization),
            "auto-round": lambda: AutoRound(quantization),
            "fp8": lambda: sglang_others.Fp8(quantization),
            "awq": lambda: sglang_others.Awq(quantization),
            **dict.fromkeys(METHODS, lambda: sglang_others.modelopt(quantization, heads_by_layers)),
        },
    )
