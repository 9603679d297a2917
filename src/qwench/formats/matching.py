"""Names of modules as patterns that several engines read alike.

A compressed-tensors config names modules by exact name, by regular expression (`re:`, matched from the beginning), or by class (`Linear`).
The engines differ in what they compare those with:

- transformers: with its own module names, which are those of the checkpoint.
- vLLM: with its runtime names (`language_model.model.layers.3...` for `model.language_model.layers.3...`); it renames exact names and
  leaves patterns alone, and before 0.32 dropped exact names that begin with `mtp.`. Of a fused module it asks the members, or the fused name.
- SGLang: with its runtime names, exact names by containment (`...mlp.gate` is found in `...mlp.gate_proj`); inside the MTP head it knows
  fused names only.

So: patterns without the prefix of the trunk, anchored at the end, that also name what engines fuse, and that do not reach into the
MTP head, which has layers of its own. Modules of a layer are gathered into one pattern per parent, so that a list of 30,000 experts
becomes a line.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Runtime names of what engines fuse, and the members."""

TRUNK, MTP, OTHER = "trunk", "mtp", "other"
LAYER = re.compile(r"^(?P<prefix>(?:.*\.)?)layers\.(?P<layer>\d+)\.(?P<parent>(?:.*\.)?)(?P<leaf>[^.]+)$")
EXPERT = re.compile(r"experts\.\d+\.$")
ANY_EXPERT = "experts.#."
SCOPES = {TRUNK: r"re:(?!mtp\.)(?:.*\.)?layers\.", MTP: r"re:mtp\.layers\."}


@dataclass(frozen=True)
class Place:
    """Where a module stands in its stack.

    Attributes:
        scope: the trunk, the MTP head, or neither (then only `leaf` is set, to the whole name).
        layer: number of its decoder layer.
        parent: what lies between layer and leaf, with its dot; expert numbers are replaced by `#`.
        leaf: the last component.
    """

    scope: str
    layer: int
    parent: str
    leaf: str


def place(module: str) -> Place:
    found = LAYER.match(module)
    if not found:
        return Place(OTHER, -1, "", module)
    scope = MTP if module.startswith("mtp.") else TRUNK
    return Place(scope, int(found["layer"]), EXPERT.sub(ANY_EXPERT, found["parent"]), found["leaf"])


def patterns(
    wanted: Collection[str], others: Iterable[str], containers: bool = False, scopes: Mapping[str, str] = SCOPES
) -> list[str]:
    """Patterns that match every wanted module, under any engine's name for it, and none of the others.

    Args:
        containers: also match the module that holds all experts, where every one of its projections is wanted.
        scopes: what a pattern begins with, up to the number of the layer, in the trunk and in the MTP head.
    """
    mine, foreign = _layers(wanted), _layers(others)
    clash = {key for key in mine for layer in mine[key] if layer in foreign.get(key, {})}
    exact = sorted(m for m in wanted if _key(place(m)) in clash or place(m).scope == OTHER)
    families: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for key, layers in mine.items():
        if key not in clash and key[0] != OTHER:
            scope, parent, leaf = key
            families[scope, parent, _numbers(layers, whole=key not in foreign)].add(leaf)
    lines = [_line(scopes[scope], parent, numbers, leaves, containers) for (scope, parent, numbers), leaves in families.items()]
    return sorted(lines) + [exact_pattern(m, scopes) for m in exact]


def exact_pattern(module: str, scopes: Mapping[str, str] = SCOPES) -> str:
    """A pattern for one module under any engine's prefix. Modules outside of layers keep their own name from the part that all engines share."""
    at = place(module)
    if at.scope != OTHER:
        found = LAYER.match(module)
        assert found
        return scopes[at.scope] + re.escape(f"{at.layer}.{found['parent']}{at.leaf}") + "$"
    if module.startswith("mtp."):
        return f"re:{re.escape(module)}$"
    return f"re:(?:.*\\.)?{re.escape(module.removeprefix('model.').removeprefix('language_model.'))}$"


def matches(entry: str, module: str) -> bool:
    """Whether an entry of `targets` or `ignore` means this module by name, as compressed-tensors compares it."""
    return bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module


Key = tuple[str, str, str]


def _key(at: Place) -> Key:
    return at.scope, at.parent, at.leaf


def _layers(modules: Iterable[str]) -> Mapping[Key, dict[int, None]]:
    """The layers in which each place occurs, in order."""
    layers: dict[Key, dict[int, None]] = defaultdict(dict)
    for module in modules:
        at = place(module)
        layers[_key(at)][at.layer] = None
    return layers


def _numbers(layers: Iterable[int], whole: bool) -> str:
    return r"\d+" if whole else "(?:" + "|".join(str(n) for n in sorted(layers)) + ")"


def _line(begin: str, parent: str, numbers: str, leaves: set[str], containers: bool) -> str:
    """One pattern for several leaves of one parent, with the names that engines give to what they fuse of them."""
    names = leaves | {fused for fused, members in FUSED.items() if leaves.issuperset(members)}
    choice = "(?:" + "|".join(sorted(names)) + ")"
    stem = begin + numbers + r"\."
    if parent.endswith(ANY_EXPERT):
        holder, inside = re.escape(parent.removesuffix(".#.")), rf"\.\d+\.{choice}"
        whole = containers and leaves.issuperset(("gate_proj", "up_proj", "down_proj"))
        return f"{stem}{holder}(?:{inside})?$" if whole else f"{stem}{holder}{inside}$"
    return f"{stem}{re.escape(parent)}{choice}$"
