"""How vLLM 0.32 decides whether and how a module is quantized: `CompressedTensorsConfig`, `AutoGPTQConfig`, `INCConfig` (auto-round); for formats of other writers see `vllm_others`.

A decider is asked with vLLM's name of a module and answers with a scheme, with None (built unquantized), or raises `Stop`: vLLM stops there. Deciders are made anew for each
class of model that is built, since each class brings its own list of joined modules; names in the config are renamed once, by the main model's class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from qwench.errors import CheckpointError
from qwench.formats.gptq import read_numbers
from qwench.formats.quantization_config import read_group
from qwench.loading import eight_bits, vllm_others
from qwench.loading.modelopt import METHODS
from qwench.loading.parts import Built, Module, Stop
from qwench.loading.patterns import (
    RE,
    agreeing,
    all_or_none,
    auto_round_numbers,
    auto_round_stacks,
    dynamic_of,
    first_match,
    flat,
    gptq_checked,
    gptq_numbers,
    renamed,
    shard_names,
)
from qwench.loading.vllm_others import Packed
from qwench.numerics import Scheme

CLASSES = {
    "qkv_proj": "QKVParallelLinear",
    "qkv": "QKVParallelLinear",
    "o_proj": "RowParallelLinear",
    "down_proj": "RowParallelLinear",
    "out_proj": "RowParallelLinear",
    "proj": "RowParallelLinear",
    "linear_fc2": "RowParallelLinear",
    "fc": "ColumnParallelLinear",
    "linear_fc1": "ColumnParallelLinear",
    "lm_head": "ParallelLMHead",
}
"""vLLM's class of a module, which a target may name or be a part of; the others are MergedColumnParallelLinear."""
EXPERTS_CLASS = "RoutedExperts"
SPECIAL = frozenset(r"*+?^$()[]{}|\\")
"""What makes a key of `extra_config` an expression to vLLM."""


class Decider(Protocol):
    """How one quantization method decides."""

    def scheme(self, module: Module, packed: Packed) -> Built | None:
        """How a module is built; None: unquantized. Raises Stop."""


class Unquantized:
    """No quantization_config."""

    def scheme(self, module: Module, packed: Packed) -> Scheme | None:
        return None


class CompressedTensors:
    """`CompressedTensorsConfig.get_scheme_dict`, `utils.should_ignore_layer`, `utils.find_matched_target`."""

    def __init__(self, config: Mapping[str, Any], prefixes: Mapping[str, str]) -> None:
        self.config = config
        self.ignore = [self._named(entry, prefixes) for entry in config.get("ignore") or ()]
        self.groups: dict[str, Mapping[str, Any]] = {
            self._named(target, prefixes): group
            for group in (config.get("config_groups") or {}).values()
            for target in group.get("targets") or ()
        }

    @staticmethod
    def _named(entry: str, prefixes: Mapping[str, str]) -> str:
        return entry if entry.startswith(RE) or "." not in entry else renamed(entry, prefixes)

    def scheme(self, module: Module, packed: Packed) -> Scheme | None:
        if module.kind != "experts":
            found = self._of(module.asked, CLASSES.get(module.leaf, "MergedColumnParallelLinear"), packed)
            return eight_bits.checked(found, module)
        names = [f"{module.asked}.0.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
        schemes = [self._of(name, EXPERTS_CLASS, packed) for name in names]
        if any(scheme != schemes[0] for scheme in schemes):
            raise Stop("gate, up and down of the experts are not in one scheme", "ct-experts-one-scheme")
        return eight_bits.checked(schemes[0], module)

    def _of(self, name: str, of_class: str, packed: Packed) -> Scheme | None:
        if self._ignored(name, packed):
            return None
        target = first_match(name, self.groups) or self._by_members(name, packed) or self._by_class(of_class)
        if target is None:
            return None
        if self.groups[target].get("weights", {}).get("actorder") in ("group", "dynamic"):
            raise Stop("activation order by group is no longer supported", "ct-no-activation-order")
        return read_group(self.groups[target], self.config, name)

    def _ignored(self, name: str, packed: Packed) -> bool:
        if first_match(name, self.ignore):
            return True
        found = [first_match(shard, self.ignore) is not None for shard in shard_names(name, packed)]
        return all_or_none(name, found, "in `ignore`", "ct-ignore-all-or-none")

    def _by_members(self, name: str, packed: Packed) -> str | None:
        fused = next((key for key in packed if name.endswith(key)), None)
        if fused is None:
            return None
        hits = [first_match(name.replace(fused, member), self.groups) for member in packed[fused]]
        return hits[0] if all(hits) else None

    def _by_class(self, of_class: str) -> str | None:
        if of_class == EXPERTS_CLASS:
            named = first_match(of_class, self.groups, contained=True)
            return named or ("Linear" if "Linear" in self.groups else None)
        return first_match(of_class, self.groups, contained=True)


class Gptq:
    """`AutoGPTQConfig` and `gptq_utils`: `dynamic` by vLLM's names, and the modules that have integers in the files' headers."""

    def __init__(self, config: Mapping[str, Any], prefixes: Mapping[str, str], stored: Sequence[str], mtp: bool) -> None:
        self.config, self.dynamic = config, config.get("dynamic") or {}
        listed = flat(config.get("modules_in_block_to_quantize") or ()) or list(stored)
        self.quantized = [renamed(name, prefixes) for name in listed]
        self.bare_head = mtp and any(key.startswith("-:") and "mtp" in key for key in self.dynamic)
        values = [{**config, **numbers} for key, numbers in self.dynamic.items() if not key.startswith("-:")]
        if any(v.get("desc_act") and v.get("group_size") != -1 for v in (config, *values)):
            raise Stop("activation order (desc_act) is no longer supported", "gptq-no-desc-act")
        gptq_checked(config, "vLLM reads")

    def scheme(self, module: Module, packed: Packed) -> Scheme | None:
        if module.kind == "head" and not self.config.get("lm_head", False):
            return None
        if self.bare_head and module.asked.startswith("mtp.layers."):
            return None
        if module.kind != "experts" and not self._has_integers(module.asked, packed):
            return None
        numbers = dynamic_of(self.dynamic, module.asked)
        if numbers is None:
            return None
        return gptq_numbers({**self.config, **numbers, "desc_act": False}, module.asked, "vLLM reads")

    def _has_integers(self, name: str, packed: Packed) -> bool:
        if not self.quantized:
            return True
        found = [any(q in shard for q in self.quantized) for shard in shard_names(name, packed)]
        return all_or_none(name, found, "quantized", "gptq-all-or-none")


class AutoRound:
    """`INCConfig` and `INCConfigParser`: exact keys of `extra_config`, keys by suffix, stacks, members of joined modules, expressions."""

    def __init__(self, config: Mapping[str, Any], prefixes: Mapping[str, str]) -> None:
        self.config = config
        self.extra: dict[str, Mapping[str, Any]] = {
            renamed(key, prefixes): values for key, values in (config.get("extra_config") or {}).items()
        }
        self.stacks = tuple(renamed(name, prefixes) for name in auto_round_stacks(config))

    def scheme(self, module: Module, packed: Packed) -> Scheme | None:
        values = self._values(module, packed)
        if values["bits"] >= 16:
            return None
        if not values["sym"]:
            raise Stop("asymmetric integers have no kernel", "inc-numbers")
        return read_numbers({**values, "desc_act": False}, module.asked)

    def _values(self, module: Module, packed: Packed) -> dict[str, Any]:
        name = module.asked
        if self.extra.get(f"model.{name}", {}).get("bits", 0) >= 16:
            return self._numbers(f"model.{name}", True)
        if name in self.extra:
            return self._numbers(name, True)
        if key := next((key for key in self.extra if name.endswith(f".{key}")), None):
            return self._numbers(key, True)
        quantized = name.startswith(self.stacks) if self.stacks else module.kind != "head"
        for fused, members in packed.items() if self.extra else ():
            if name.count(fused) == 1:
                shards = [name.replace(fused, member) for member in members]
                if any(self._entry(shard) is not None for shard in shards):
                    return agreeing([self._numbers(shard, quantized) for shard in shards])
        return self._numbers(name, quantized)

    def _numbers(self, name: str, quantized: bool) -> dict[str, Any]:
        return auto_round_numbers(self.config, self._entry(name) or {}, quantized)

    def _entry(self, name: str) -> Mapping[str, Any] | None:
        if name in self.extra:
            return self.extra[name]
        for key, values in self.extra.items():
            if set(key) & SPECIAL and re.search(key, name):
                return values
        return None


def decider_of(
    config: Mapping[str, Any] | None,
    prefixes: Mapping[str, str],
    stored: Sequence[str],
    mtp: bool = False,
    plain: Sequence[str] = (),
) -> Decider:
    """The decider of a quantization_config.

    Args:
        prefixes: how the main model's class renames the names in it.
        stored: modules that have integer tensors in the files.
        mtp: whether the network that drafts is built.
        plain: names before the last dot that have none.

    Raises:
        Stop: vLLM refuses the config as a whole.
        CheckpointError: a method that this table does not know.
    """
    quantization = config or {}
    return chosen(
        quantization,
        {
            "compressed-tensors": lambda: CompressedTensors(quantization, prefixes),
            "gptq": lambda: Gptq(quantization, prefixes, stored, mtp),
            "auto-round": lambda: AutoRound(quantization, prefixes),
            "fp8": lambda: vllm_others.Fp8(quantization, prefixes),
            **dict.fromkeys(("awq", "auto_awq", "awq_marlin"), lambda: vllm_others.Awq(quantization, prefixes, plain)),
            **dict.fromkeys(METHODS, lambda: vllm_others.modelopt(quantization, prefixes, mtp)),
        },
    )


def chosen(config: Mapping[str, Any], deciders: Mapping[str, Callable[[], Decider]]) -> Decider:
    """The decider of a config's method. Raises CheckpointError where there is none; `reading` says so before."""
    method = config.get("quant_method", "compressed-tensors")
    if not config:
        return Unquantized()
    if method not in deciders:
        raise CheckpointError(f"the checkpoint is quantized with {method!r}", "the offline proof does not know it")
    return deciders[method]()
