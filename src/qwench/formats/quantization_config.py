"""The `quantization_config` of `config.json`: written for our releases, read for anybody's.

One scheme: a group that targets `Linear`, and everything that is not quantized in `ignore`. Several: the scheme of the routed experts, or else
the most frequent one, has the group that targets `Linear`; the others name their modules by pattern, which goes before the class in every
engine. Why not patterns everywhere: the MoE loaders of SGLang look up the entry `Linear` itself, and transformers takes the experts' scheme
from it. Why a complete `ignore`: SGLang refuses a linear layer that neither side names.

The MTP head is in `ignore` as a pattern (SGLang, vLLM) and by its names (readers that compare names). Of experts only number 0 is named, the
one that vLLM asks for; the pattern speaks for all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwench.errors import CheckpointError
from qwench.formats.matching import OTHER, exact_pattern, matches, patterns, place
from qwench.numerics import Scheme
from qwench.numerics.scheme import StoredActivations

METHOD = "compressed-tensors"
VERSION = "0.20.0"
"""Of the library that our bytes are checked against."""

FORMAT_OF = {
    "int": "pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "fp8": "float-quantized",
}
"""Container format by kind of scheme, of what we write."""
PLAIN_INTEGERS = "int-quantized"
"""Of others: integers one to a byte, in layers whose inputs are integers too."""


def format_of(scheme: Scheme) -> str:
    """The container format of a scheme."""
    return PLAIN_INTEGERS if scheme.activations == "int8" else FORMAT_OF[scheme.kind]


CLASS = "Linear"
COMPONENTS = {"mtp": r"re:^mtp\..*", "vision": r"re:^(?:model\.)?visual\..*"}
"""A pattern for everything in a component."""
PREFIXES_OF = {"mtp": ("mtp.",), "vision": ("model.visual.", "visual.")}
ROUTED = re.compile(r"\.experts\.\d+\.")


def quantization_config(assigned: Mapping[str, Scheme], kept: Collection[str]) -> dict[str, Any]:
    """What `config.json` says about a release.

    Args:
        assigned: module path -> scheme, of every quantized weight (experts one by one).
        kept: module paths of all other linear layers (experts one by one, the tower and the MTP head included).
    """
    assert assigned, "a release without quantized weights has no quantization_config"
    by_scheme = by_stored_scheme(assigned)
    first = leading_scheme(by_scheme)
    # Last: the library stops at the first target that a module matches, and warns of targets that it never came to.
    order = [*(s for s in by_scheme if s != first), first]
    groups = {f"group_{i}": _group(s, _targets(s, s == first, by_scheme, kept)) for i, s in enumerate(order)}
    formats = {format_of(s) for s in order}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": _ignore(assigned, kept),
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "version": VERSION,
    }


def by_stored_scheme(assigned: Mapping[str, Scheme]) -> dict[Scheme, list[str]]:
    """Modules by what a reader can know of their scheme: not how its scales were chosen."""
    by_scheme: dict[Scheme, list[str]] = {}
    for module, s in assigned.items():
        stored = replace(s, full_range=False, search="none")
        by_scheme.setdefault(stored, []).append(module)
    return by_scheme


def leading_scheme(by_scheme: Mapping[Scheme, Sequence[str]]) -> Scheme:
    """The scheme that is the rule: of the routed experts if there are any, else the most frequent, the first of equals."""
    routed = Counter({s: sum(1 for m in modules if ROUTED.search(m)) for s, modules in by_scheme.items()})
    if routed.total():
        return routed.most_common(1)[0][0]
    return Counter({s: len(modules) for s, modules in by_scheme.items()}).most_common(1)[0][0]


def _targets(scheme: Scheme, of_class: bool, by_scheme: Mapping[Scheme, Sequence[str]], kept: Collection[str]) -> list[str]:
    """The class, and by name what the class does not reach (vLLM's head is no linear layer); or patterns."""
    mine = by_scheme[scheme]
    if of_class:
        return [CLASS, *(exact_pattern(m) for m in mine if place(m).scope == OTHER and m.endswith("lm_head"))]
    others = [m for s, modules in by_scheme.items() if s != scheme for m in modules]
    return patterns(mine, [*others, *kept])


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    return {
        "format": format_of(scheme),
        "input_activations": activation_arguments(scheme),
        "output_activations": None,
        "targets": targets,
        "weights": weight_arguments(scheme),
    }


def weight_arguments(scheme: Scheme) -> dict[str, Any]:
    """A scheme in the words of compressed-tensors (`QuantizationArgs`)."""
    arguments: dict[str, Any] = {
        "actorder": "group" if scheme.ordered else None,
        "block_structure": list(scheme.block) if scheme.block else None,
        "dynamic": False,
        "group_size": scheme.group,
        "num_bits": scheme.bits,
        "strategy": "block" if scheme.block else "group" if scheme.group else "tensor" if scheme.tensor else "channel",
        "symmetric": scheme.symmetric,
        "type": "int" if scheme.kind == "int" else "float",
    }
    if scheme.kind == "nvfp4":
        arguments |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    if scheme.kind == "mxfp4":
        arguments |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return arguments


EIGHT_BITS: dict[str, dict[str, Any]] = {
    "fp8": {"dynamic": True, "strategy": "token"},
    "fp8-tensor": {"dynamic": False, "strategy": "tensor"},
    "fp8-group": {"dynamic": True, "strategy": "group"},
    "int8": {"dynamic": True, "strategy": "token", "type": "int"},
}
"""What tells inputs of eight bits apart."""


def activation_arguments(scheme: Scheme) -> dict[str, Any] | None:
    """What a scheme does to the inputs of its layers, in the words of compressed-tensors (`QuantizationArgs`); None: nothing."""
    if scheme.activations == "none":
        return None
    arguments: dict[str, Any] = {"actorder": None, "block_structure": None, "symmetric": True, "type": "float"}
    if scheme.activations in EIGHT_BITS:
        return (
            arguments
            | {"group_size": scheme.block[1] if scheme.block else None, "num_bits": 8}
            | EIGHT_BITS[scheme.activations]
        )
    e4m3 = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    return arguments | {"dynamic": "local", "group_size": 16, "num_bits": 4, "strategy": "tensor_group"} | e4m3


def _ignore(assigned: Mapping[str, Scheme], kept: Collection[str]) -> list[str]:
    """Every linear layer that is not quantized, in few lines: whole components by one pattern where nothing of them is quantized."""
    components, rest = whole_components(assigned, kept)
    lines = [COMPONENTS[c] for c in components] + patterns(rest, assigned, containers=True)
    names = [m for m in kept if m.startswith("mtp.") and (not ROUTED.search(m) or ".experts.0." in m)]
    return lines + sorted(names) + [m for m in rest if m == "lm_head"]


def whole_components(assigned: Mapping[str, Scheme], kept: Collection[str]) -> tuple[list[str], list[str]]:
    """Of `mtp` and `vision` those that have linear layers and none of them quantized, and the kept modules outside of those, sorted."""
    rest, components = set(kept), []
    for component, prefixes in PREFIXES_OF.items():
        mine = {m for m in kept if m.startswith(prefixes)}
        if mine and not any(m.startswith(prefixes) for m in assigned):
            components.append(component)
            rest -= mine
    return components, sorted(rest)


def scheme_of(config: Mapping[str, Any], module: str) -> Scheme | None:
    """The scheme of a linear module according to a `quantization_config`, ours or anybody's; None where it is not quantized.

    By the rules of compressed-tensors: `ignore` goes first; an exact name goes before a pattern, a pattern before the class `Linear`.
    `full_range` and `search` cannot be known and are left at their defaults; they do not change what codes mean.

    Raises:
        CheckpointError: another method than compressed-tensors, or a format that we cannot read.
    """
    if config.get("quant_method", METHOD) != METHOD:
        what = f"the checkpoint is quantized with {config.get('quant_method')!r}"
        raise CheckpointError(what, f"Qwench reads {METHOD} and unquantized checkpoints")
    if any(matches(entry, module) for entry in config.get("ignore") or ()):
        return None
    ranked = [
        (_specificity(target, module), group)
        for group in (config.get("config_groups") or {}).values()
        for target in group["targets"]
    ]
    best, group = min(ranked, key=lambda r: r[0], default=(NO_MATCH, None))
    return read_group(group, config, module) if group is not None and best < NO_MATCH else None


NO_MATCH = 3


def _specificity(target: str, module: str) -> int:
    """0: the exact name, 1: a pattern, 2: the class, 3: no match."""
    if matches(target, module):
        return 1 if target.startswith("re:") else 0
    return 2 if target == CLASS else NO_MATCH


def read_group(group: Mapping[str, Any], config: Mapping[str, Any], module: str) -> Scheme | None:
    weights = group.get("weights")
    if weights is None:
        return None
    stored = group.get("format") or config.get("format")
    weight, inputs = _read_weights(weights), group.get("input_activations") or None
    mend = f"Qwench reads {', '.join((*FORMAT_OF.values(), PLAIN_INTEGERS))} as docs/formats.md describes them"
    if weight is None:
        raise CheckpointError(f"{module} is stored as {stored!r} with weights {dict(weights)}", mend)
    activations = _read_activations(inputs, weight) if inputs else "none"
    if activations is None:
        raise CheckpointError(f"{module} is stored as {stored!r} ({weight.label}) with inputs {dict(inputs or {})}", mend)
    scheme = replace(weight, activations=activations)
    if stored != format_of(scheme) or (scheme.kind == "int" and scheme.tensor and activations != "int8"):
        raise CheckpointError(f"{module} is stored as {stored!r} with weights {dict(weights)} and inputs {inputs}", mend)
    return scheme


def _read_activations(found: Mapping[str, Any], scheme: Scheme) -> StoredActivations | None:
    """What is done to inputs, or None where we cannot do it: a release read without that would be measured wrongly."""
    if not found.get("symmetric", True):
        return None
    kind = found.get("type", "int"), found.get("num_bits", 8), found.get("strategy"), found.get("dynamic"), scheme.kind
    group = found.get("group_size")
    if kind == ("float", 4, "tensor_group", "local", "nvfp4") and group == 16:
        return "nvfp4"
    if kind == ("float", 8, "group", True, "fp8") and scheme.block and group == scheme.block[1]:
        return "fp8-group"
    if kind == ("int", 8, "token", True, "int") and scheme.bits == 8 and scheme.group is None and scheme.symmetric:
        return "int8"
    known: dict[Any, StoredActivations] = {("token", True): "fp8", ("tensor", False): "fp8-tensor"}
    plain = (kind[0], kind[1], kind[4]) == ("float", 8, "fp8") and not scheme.block
    return known.get((kind[2], bool(kind[3]))) if plain else None


def _read_weights(weights: Mapping[str, Any]) -> Scheme | None:
    """A scheme from `QuantizationArgs`, or None where we have none for it."""
    bits, kind, symmetric = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("symmetric", True)
    group = weights.get("group_size")
    group = group if group and group > 0 else None
    block = weights.get("block_structure")
    strategy = weights.get("strategy") or ("group" if group else "block" if block else "tensor")
    ordered = weights.get("actorder") in ("group", "dynamic", True)
    if weights.get("dynamic") or (ordered and (kind != "int" or not group)):
        return None
    if kind == "int" and bits in (4, 8) and strategy in ("group", "channel"):
        return Scheme("int", bits, group, symmetric=symmetric, ordered=ordered)
    if kind == "int" and bits == 8 and strategy == "tensor" and symmetric:
        return Scheme("int", 8, tensor=True)
    if kind == "float" and symmetric:
        known = {
            (4, "tensor_group", 16): Scheme("nvfp4", 4, 16),
            (4, "group", 32): Scheme("mxfp4", 4, 32),
            (8, "channel", None): Scheme("fp8", 8),
            (8, "tensor", None): Scheme("fp8", 8, tensor=True),
        }
        if bits == 8 and strategy == "block" and block and len(block) == 2 and min(block) > 0:
            return Scheme("fp8", 8, block=(int(block[0]), int(block[1])))
        return known.get((bits, strategy, group))
    return None
