"""How vLLM 0.32 decides whether and how a module is quantized: `CompressedTensorsConfig`, `AutoGPTQConfig`, `INCConfig` (auto-round).

A decider is asked with vLLM's name of a module and answers with a scheme, with None (built unquantized), or raises `Stop`: vLLM stops there. The three are made anew for each
class of model that is built, since each class brings its own list of joined modules; names in the config are renamed once, by the main model's class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qwench.errors import CheckpointError
from qwench.formats.gptq import read_numbers
from qwench.formats.quantization_config import read_group
from qwench.loading.parts import Module
from qwench.loading.patterns import RE, dynamic_of, first_match, renamed, shard_names
from qwench.loading.replay import Stop
from qwench.numerics import Scheme

Packed = Mapping[str, Sequence[str]]
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

    def scheme(self, module: Module, packed: Packed) -> Scheme | None:
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
            return self._of(module.asked, CLASSES.get(module.leaf, "MergedColumnParallelLinear"), packed)
        names = [f"{module.asked}.0.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
        found = [self._of(name, EXPERTS_CLASS, packed) for name in names]
        if any(scheme != found[0] for scheme in found):
            raise Stop("gate, up and down of the experts are not in one scheme", "ct-experts-one-scheme")
        if found[0] is not None and found[0].kind == "fp8" and found[0].activations == "none":
            raise Stop("weight-only FP8 experts: there is no such method", "ct-experts-methods")
        return found[0]

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
        if any(found) and not all(found):
            raise Stop("some of its members are in `ignore` and some are not", "ct-ignore-all-or-none")
        return all(found)

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
        listed = _flat(config.get("modules_in_block_to_quantize") or ()) or list(stored)
        self.quantized = [renamed(name, prefixes) for name in listed]
        self.bare_head = mtp and any(key.startswith("-:") and "mtp" in key for key in self.dynamic)
        values = [{**config, **numbers} for key, numbers in self.dynamic.items() if not key.startswith("-:")]
        if any(v.get("desc_act") and v.get("group_size") != -1 for v in (config, *values)):
            raise Stop("activation order (desc_act) is no longer supported", "gptq-no-desc-act")
        if (config.get("bits"), config.get("sym")) not in {(4, True), (8, True)}:
            raise Stop(f"{config.get('bits')} bits, sym {config.get('sym')}: symmetric 4 and 8 bits are read", "gptq-numbers")

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
        values = {**self.config, **numbers, "desc_act": False}
        if (values.get("bits"), values.get("sym")) not in {(4, True), (8, True)}:
            raise Stop(f"{values.get('bits')} bits, sym {values.get('sym')}: symmetric 4 and 8 bits are read", "gptq-numbers")
        return read_numbers(values, module.asked)

    def _has_integers(self, name: str, packed: Packed) -> bool:
        if not self.quantized:
            return True
        found = [any(q in shard for q in self.quantized) for shard in shard_names(name, packed)]
        if any(found) and not all(found):
            raise Stop("some of its members are quantized and some are not", "gptq-all-or-none")
        return found[0]


class AutoRound:
    """`INCConfig` and `INCConfigParser`: exact keys of `extra_config`, keys by suffix, stacks, members of joined modules, expressions."""

    def __init__(self, config: Mapping[str, Any], prefixes: Mapping[str, str]) -> None:
        self.config = config
        self.extra: dict[str, Mapping[str, Any]] = {
            renamed(key, prefixes): values for key, values in (config.get("extra_config") or {}).items()
        }
        stacks = config.get("block_name_to_quantize") or config.get("to_quant_block_names") or ()
        listed = stacks.split(",") if isinstance(stacks, str) else _flat(stacks)
        self.stacks = tuple(renamed(name, prefixes) for name in listed)

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
                    return self._agreeing(shards, quantized)
        return self._numbers(name, quantized)

    def _agreeing(self, shards: Sequence[str], quantized: bool) -> dict[str, Any]:
        found = [self._numbers(shard, quantized) for shard in shards]
        if any(values != found[0] for values in found):
            raise Stop("its members have different numbers in `extra_config`", "inc-all-or-none")
        return found[0]

    def _numbers(self, name: str, quantized: bool) -> dict[str, Any]:
        base = {
            "bits": self.config.get("bits"),
            "group_size": self.config.get("group_size"),
            "sym": self.config.get("sym", True),
        }
        entry = self._entry(name) or {}
        values = base if quantized else {"bits": 16, "group_size": -1, "sym": True}
        return {key: entry.get(key, value) for key, value in values.items()}

    def _entry(self, name: str) -> Mapping[str, Any] | None:
        if name in self.extra:
            return self.extra[name]
        for key, values in self.extra.items():
            if set(key) & SPECIAL and re.search(key, name):
                return values
        return None


def decider_of(
    config: Mapping[str, Any] | None, prefixes: Mapping[str, str], stored: Sequence[str], mtp: bool = False
) -> Decider:
    """The decider of a quantization_config.

    Args:
        prefixes: how the main model's class renames the names in it.
        stored: modules that have integer tensors in the files.
        mtp: whether the network that drafts is built.

    Raises:
        Stop: vLLM refuses the config as a whole.
        CheckpointError: a method that this table does not know.
    """
    if not config:
        return Unquantized()
    method = config.get("quant_method", "compressed-tensors")
    if method == "compressed-tensors":
        return CompressedTensors(config, prefixes)
    if method == "gptq":
        return Gptq(config, prefixes, stored, mtp)
    if method == "auto-round":
        return AutoRound(config, prefixes)
    raise CheckpointError(
        f"the checkpoint is quantized with {method!r}", "the offline proof knows compressed-tensors, gptq and auto-round"
    )


def _flat(names: Any) -> list[str]:
    return [leaf for name in names for leaf in ([name] if isinstance(name, str) else _flat(name))]
