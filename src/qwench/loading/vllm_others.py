"""How vLLM 0.32 decides in formats of other writers: `Fp8Config`, `AutoAWQConfig`, `ModelOptFp8Config`, `ModelOptNvFp4Config`, `ModelOptMixedPrecisionConfig`.

All of them have one list of what is not quantized, and each reads it in its own way:

- FP8: exact names; of a joined module the joined name, or all members. Experts: an entry that begins with their name.
- AWQ: any part of a name (`gate` is a part of `gate_up_proj`). An empty list is filled from the headers: every name before the last dot that holds no integers, `...layers.0.linear_attn` (of `A_log`) among them.
- ModelOpt: as FP8, then any part of a name, then wildcards; `X*` stands for `X` and for `X.*`. The output head is quantized unless it is excluded. In NVFP4 files the head's `mtp.fc` is built unquantized.

Exact names are renamed like tensors, once, by the main model's class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from qwench.loading.modelopt import MIXED, ModelOpt, read_modelopt
from qwench.loading.parts import Module, Stop
from qwench.loading.patterns import renamed, skipped
from qwench.loading.stored import Stored, awq, block_fp8, modelopt_block_fp8, mxfp8, nvfp4, row_fp8, tensor_fp8

Packed = Mapping[str, Sequence[str]]
ALGOS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", MIXED)
BLOCK_ALGOS = ("FP8_PB_WO", "FP8_BLOCK_SCALES")
LEGACY = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4")
"""What it knows in an hf_quant_config.json that has no config.json beside it that says so too."""


class Fp8:
    """`Fp8Config`."""

    def __init__(self, config: Mapping[str, Any], prefixes: Mapping[str, str]) -> None:
        inputs, block = config.get("activation_scheme"), config.get("weight_block_size")
        if inputs not in ("static", "dynamic"):
            raise Stop(f"`activation_scheme` is {inputs!r}: static and dynamic are known", "fp8-config")
        if block is not None and (len(block) != 2 or inputs != "dynamic"):
            raise Stop(f"blocks {block} with {inputs} input scales: two numbers and dynamic ones are read", "fp8-config")
        listed = config.get("ignored_layers") or config.get("modules_to_not_convert") or []
        self.ignored = [renamed(name, prefixes) for name in listed]
        self.block = (int(block[0]), int(block[1])) if block is not None else None
        self.built = (
            block_fp8(self.block) if self.block else tensor_fp8("weight_scale", "input_scale" if inputs == "static" else "")
        )

    def scheme(self, module: Module, packed: Packed) -> Stored | None:
        if module.kind == "head" or exactly(module, packed, self.ignored, "fp8-all-or-none"):
            return None
        if module.kind == "experts" and self.block:
            fits_blocks(module, self.block[0], "fp8-blocks")
        return self.built


def exactly(module: Module, packed: Packed, ignored: Sequence[str], rule: str) -> bool:
    """`is_layer_skipped` with exact names. Raises Stop."""
    if module.kind == "experts":
        return any(module.asked in entry for entry in ignored if "experts" in entry)
    return skipped(module.asked, packed, lambda name: name in ignored, rule)


def fits_blocks(module: Module, rows: int, rule: str) -> None:
    """Raises Stop where gate and up of experts do not begin with a block."""
    width = module.members[0].shape[0]
    if width % rows:
        raise Stop(f"experts of width {width} cannot be cut into blocks of {rows} rows", rule)


class Awq:
    """`AutoAWQConfig`."""

    def __init__(self, config: Mapping[str, Any], prefixes: Mapping[str, str], plain: Sequence[str]) -> None:
        bits, group = config.get("w_bit", config.get("bits")), config.get("q_group_size", config.get("group_size"))
        if bits != 4 or group is None or "zero_point" not in config:
            raise Stop(
                f"bits {bits}, group_size {group}, zero_point {config.get('zero_point')}: 4 bits are read, and all three are asked for",
                "awq-config",
            )
        self.head, self.built = bool(config.get("lm_head", False)), awq(4, int(group))
        self.group = int(group)
        self.kept = [renamed(name, prefixes) for name in config.get("modules_to_not_convert") or plain]

    def scheme(self, module: Module, packed: Packed) -> Stored | None:
        if module.kind == "head" and not self.head:
            return None
        if module.kind == "experts":
            return None if self._means(module.asked) else self.built
        if skipped(module.asked, packed, self._means, "awq-all-or-none"):
            return None
        for member in module.members:
            if self.group != -1 and member.shape[1] % self.group:
                raise Stop(f"{member.shape[1]} inputs cannot be cut into groups of {self.group}", "awq-config")
        return self.built

    def _means(self, name: str) -> bool:
        return any(entry in name for entry in self.kept)


class Excluding:
    """`ModelOptQuantConfigBase.is_layer_excluded`, with the list as `apply_vllm_mapper` leaves it."""

    def __init__(self, said: ModelOpt, prefixes: Mapping[str, str]) -> None:
        split = [part for entry in said.exclude for part in ((entry[:-1], f"{entry[:-1]}.*") if _is_tree(entry) else (entry,))]
        self.excluded = [renamed(entry, prefixes) for entry in split]

    def excludes(self, module: Module, packed: Packed) -> bool:
        """Raises Stop where it names some members of a joined module and not others."""
        name, short = module.asked, module.asked.removeprefix("language_model.")
        if self.excluded and exactly(module, packed, self.excluded, "modelopt-all-or-none"):
            return True
        return any(entry != name and (entry in name or entry in short) for entry in self.excluded) or any(
            fnmatch(name, entry) for entry in self.excluded
        )


def _is_tree(entry: str) -> bool:
    return len(entry) >= 2 and entry.endswith("*") and entry[-2] != "."


class Same(Excluding):
    """`ModelOptFp8Config`, `ModelOptNvFp4Config`, `ModelOptMxFp8Config`: one algorithm for all that is not excluded."""

    def __init__(self, said: ModelOpt, prefixes: Mapping[str, str], mtp: bool) -> None:
        super().__init__(said, prefixes)
        fp4 = said.algo in ("NVFP4", "W4A16_NVFP4")
        if fp4 and said.sidecar and said.missing:
            raise Stop(f"hf_quant_config.json lacks {', '.join(said.missing)}", "modelopt-config")
        self.bare_fc, self.group = mtp and fp4, said.group or 16
        self.algo = "W4A16_NVFP4" if said.algo == "NVFP4" and said.inputs is False else said.algo

    def scheme(self, module: Module, packed: Packed) -> Stored | None:
        if (self.bare_fc and module.asked == "mtp.fc") or self.excludes(module, packed):
            return None
        if module.kind == "experts" and self.algo.startswith("FP8"):
            return of_algo("FP8", self.group)
        return of_algo(self.algo, self.group)


class Mixed(Excluding):
    """`ModelOptMixedPrecisionConfig`: an algorithm for each module that `quantized_layers` lists."""

    def __init__(self, said: ModelOpt, prefixes: Mapping[str, str]) -> None:
        super().__init__(said, prefixes)
        if not said.layers:
            raise Stop("MIXED_PRECISION without `quantized_layers`", "modelopt-config")
        self.layers = {renamed(name, prefixes): algo for name, algo in said.layers.items()}
        self.group = said.group or 16

    def scheme(self, module: Module, packed: Packed) -> Stored | None:
        if self.excludes(module, packed):
            return None
        algo = self._of(module.asked, packed)
        if module.kind == "experts" and algo in BLOCK_ALGOS:
            return block_fp8((128, 128))
        return of_algo(algo, self.group) if algo in ALGOS else None

    def _of(self, name: str, packed: Packed) -> str | None:
        """`_resolve_quant_algo`: the name, its members, anything below it, anything beside experts. Raises Stop."""
        stem, _, leaf = name.rpartition(".")
        members = [f"{base}.{member}" for base in names_of(stem) for member in packed.get(leaf, ())]
        below = [f"{candidate}." for candidate in names_of(name)]
        beside = [f"{stem}."] if leaf == "experts" else []
        return (
            first(self.layers.get(candidate) for candidate in names_of(name))
            or one_algo([self.layers[member] for member in members if member in self.layers], name)
            or first(algo for prefix in (*below, *beside) for key, algo in self.layers.items() if key.startswith(prefix))
        )


def names_of(name: str) -> list[str]:
    """The names under which a mixed list may have a module."""
    names = [name, *(["lm_head"] if name.endswith(".lm_head") else [])]
    for mine, other in (("language_model.model.", "model.language_model."), ("model.language_model.", "language_model.model.")):
        if name.startswith(mine):
            names.append(other + name.removeprefix(mine))
    return names


def first(found: Any) -> str | None:
    """The first that is there."""
    return next((algo for algo in found if algo is not None), None)


def one_algo(algos: Sequence[str], name: str) -> str | None:
    """The algorithm of a joined module's members. Raises Stop where they have several."""
    if len(set(algos)) > 1:
        raise Stop(f"its members are in different algorithms: {', '.join(sorted(set(algos)))}", "modelopt-all-or-none")
    return algos[0] if algos else None


def of_algo(algo: str | None, group: int) -> Stored | None:
    """The tensors of an algorithm."""
    made: dict[str, Callable[[], Stored]] = {
        "FP8": lambda: tensor_fp8("weight_scale", "input_scale"), "FP8_PER_CHANNEL_PER_TOKEN": row_fp8, "FP8_PB_WO": modelopt_block_fp8,
        "NVFP4": lambda: nvfp4(group, "stored"), "W4A16_NVFP4": lambda: nvfp4(group, "dropped"), "MXFP8": mxfp8,
    }  # fmt: skip
    return made[algo]() if algo in made else None


def modelopt(config: Mapping[str, Any], prefixes: Mapping[str, str], mtp: bool) -> Same | Mixed:
    """The decider of a ModelOpt configuration. Raises Stop."""
    said = read_modelopt(config)
    if said.algo not in ALGOS or (said.sidecar and said.algo not in LEGACY):
        known = ", ".join(LEGACY if said.sidecar else ALGOS)
        where = "hf_quant_config.json alone" if said.sidecar else "config.json"
        raise Stop(f"quant_algo {said.algo} in {where}: known are {known}", "modelopt-config")
    return Mixed(said, prefixes) if said.algo == MIXED else Same(said, prefixes, mtp)
