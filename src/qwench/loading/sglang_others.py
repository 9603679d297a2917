"""How SGLang decides in formats of other writers: `Fp8Config`, `AWQMarlinConfig`, `ModelOptFp8Config`, `ModelOptFp4Config`, `ModelOptMixedPrecisionConfig`.

What differs from vLLM:

- FP8: an entry means a name that has it as whole components anywhere (`layers.0.mlp` in `mtp.layers.0.mlp`), with and without `model.` before it.
- AWQ: any part of SGLang's own name, which of a joined module is the joined one: `q_proj`, `k_proj`, `v_proj` in the list leave `qkv_proj` quantized.
- ModelOpt: as FP8, or a pattern with `*` for the whole name or for one component of it. Of an NVFP4 file the head is built unquantized, whatever the list says; of a mixed file where nothing
  of it is listed. Experts are asked for by the patterns only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from qwench.formats.matching import FUSED
from qwench.loading.modelopt import MIXED, ModelOpt, read_modelopt
from qwench.loading.parts import Module, Stop
from qwench.loading.patterns import skipped
from qwench.loading.stored import Stored, awq, block_fp8, mxfp8, nvfp4, tensor_fp8
from qwench.loading.vllm_others import BLOCK_ALGOS, Packed, first, fits_blocks, names_of, one_algo

FALLBACK: Packed = {name: FUSED[name] for name in ("qkv_proj", "gate_up_proj")}
"""Joined modules that it knows where the model's class lists none."""


class Fp8:
    """`Fp8Config`, `utils.is_layer_skipped`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        inputs, block = config.get("activation_scheme"), config.get("weight_block_size")
        if inputs not in ("static", "dynamic") or (block is not None and (len(block) != 2 or inputs != "dynamic")):
            raise Stop(f"`activation_scheme` {inputs!r} with blocks {block}: static, or dynamic with two numbers", "fp8-config")
        listed = config.get("ignored_layers") or config.get("modules_to_not_convert") or []
        bases = [name.removeprefix("model.") for name in listed]
        self.ignored = [name for base in bases for name in (base, f"model.{base}")]
        self.block = (int(block[0]), int(block[1])) if block is not None else None
        static = "input_scale" if inputs == "static" else ""
        self.built = block_fp8(self.block, strict_rows=False) if self.block else tensor_fp8("weight_scale", static)

    def scheme(self, module: Module, packed: Packed) -> Stored | None:
        if module.kind == "head" or by_components(module, packed, self.ignored, "fp8-all-or-none"):
            return None
        if self.block and module.kind == "experts":
            fits_blocks(module, self.block[0], "fp8-blocks")
        elif self.block and module.fused:
            uneven = [member for member in module.members if member.shape[0] % self.block[0]]
            if uneven:
                why = f"{uneven[0].leaf} has {uneven[0].shape[0]} rows, which blocks of {self.block[0]} do not divide"
                raise Stop(why, "fp8-blocks")
        return self.built


def by_components(module: Module, packed: Packed, ignored: Sequence[str], rule: str) -> bool:
    """`utils.is_layer_skipped`: whole components of a name. Raises Stop."""

    def means(name: str) -> bool:
        return any(f".{entry.rstrip('.')}." in f".{name}." for entry in ignored)

    if module.kind == "experts":
        return means(module.asked) or any(module.asked in entry for entry in ignored if "experts" in entry)
    known = packed if module.leaf in packed else FALLBACK
    return skipped(module.asked, known, means, rule, joined_first=False)


class Awq:
    """`AWQMarlinConfig`, `is_layer_skipped_awq`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        bits, group = config.get("bits"), config.get("group_size")
        if bits not in (4, 8) or group not in (-1, 32, 64, 128) or config.get("zero_point") is None:
            raise Stop(
                f"bits {bits}, group_size {group}, zero_point {config.get('zero_point')}: Marlin reads 4 and 8 bits in groups of 32, 64, 128",
                "awq-config",
            )
        self.head, self.built = bool(config.get("lm_head", False)), awq(int(bits), int(group))
        self.kept: Sequence[str] = config.get("modules_to_not_convert") or ()

    def scheme(self, module: Module, packed: Packed) -> Stored | None:
        if (module.kind == "head" and not self.head) or any(entry in module.asked for entry in self.kept):
            return None
        return self.built


class ModelOptDecider:
    """`ModelOptQuantConfig` and the three that derive from it.

    Args:
        heads_by_layers: whether a mixed file's head is quantized where `quantized_layers` lists something of it.
    """

    def __init__(self, said: ModelOpt, heads_by_layers: bool) -> None:
        self.said, self.group = said, said.group or 16
        listed = heads_by_layers and any(name.startswith("mtp.") for name in said.layers)
        self.bare_head = "FP4" in said.algo or (said.algo == MIXED and not listed)

    def scheme(self, module: Module, packed: Packed) -> Stored | None:
        mine = module.asked.startswith("mtp.")
        if (mine and self.bare_head) or self._excluded(module, packed):
            return None
        algo = self._of(module.asked, packed) if self.said.algo == MIXED else self.said.algo
        if algo in BLOCK_ALGOS:
            return block_fp8((128, 128), strict_rows=False)
        return {
            "FP8": tensor_fp8("weight_scale", "input_scale"), "MXFP8": mxfp8(), "W4A16_NVFP4": nvfp4(self.group, "dropped"),
            "NVFP4": nvfp4(self.group, "stored"), "NVFP4_AWQ": nvfp4(self.group, "stored", smoothed=module.kind != "experts"),
        }.get(algo or "")  # fmt: skip

    def _excluded(self, module: Module, packed: Packed) -> bool:
        if module.kind != "experts" and by_components(module, packed, self.said.exclude, "modelopt-all-or-none"):
            return True
        parts = [module.asked, *module.asked.split(".")]
        return any(_wildcard(entry).fullmatch(part) for entry in self.said.exclude for part in parts)

    def _of(self, name: str, packed: Packed) -> str | None:
        """`_resolve_quant_algo`. Raises Stop."""
        layers, (stem, _, leaf) = self.said.layers, name.rpartition(".")
        members = [f"{base}.{member}" for base in _names(stem) for member in packed.get(leaf, ())]
        return (
            first(layers.get(candidate) for candidate in _names(name))
            or one_algo([layers[member] for member in members if member in layers], name)
            or first(algo for candidate in _names(name) for key, algo in layers.items() if key.startswith(f"{candidate}."))
        )


def _names(name: str) -> list[str]:
    """The names under which a mixed list may have a module: vLLM's, and those of a model without a tower."""
    names = names_of(name)
    if name.startswith("model.language_model."):
        return [*names, "model." + name.removeprefix("model.language_model.")]
    return [*names, *(["model.language_model." + name.removeprefix("model.")] if name.startswith("model.") else [])]


@cache
def _wildcard(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.replace(".", r"\.").replace("*", ".*"))
    except re.error:
        raise Stop(f"{entry!r} in the list of excluded modules is no pattern", "modelopt-config") from None


def modelopt(config: Mapping[str, Any], heads_by_layers: bool) -> ModelOptDecider:
    """The decider of a ModelOpt configuration. Raises Stop."""
    said = read_modelopt(config)
    known = ("FP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MXFP8", MIXED)
    fp4_layers = any(algo in ("NVFP4", "W4A16_NVFP4") for algo in said.layers.values())
    if said.algo not in known or (said.algo == MIXED and not fp4_layers):
        beside = " without NVFP4 layers" if said.algo == MIXED else ""
        raise Stop(f"quant_algo {said.algo}{beside}: known are {', '.join(known)}", "modelopt-config")
    return ModelOptDecider(said, heads_by_layers)
