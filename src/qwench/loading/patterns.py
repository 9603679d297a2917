"""Questions that several engines ask of a quantization_config in the same words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwench.errors import CheckpointError

RE = "re:"


def expression(pattern: str, where: str) -> re.Pattern[str]:
    """A pattern of a config. Raises CheckpointError where it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"config.json: {where}: {pattern!r} is no pattern: {error}", "correct the pattern") from None


def entry_matches(name: str, entry: str, contained: bool = False) -> bool:
    """Whether an entry of `targets` or `ignore` means this name: `re:` from the beginning, else equal, or where `contained` is set anywhere in it."""
    if entry.startswith(RE):
        return bool(expression(entry[len(RE) :], "quantization_config").match(name))
    return entry.lower() in name.lower() if contained else entry == name


def first_match(name: str, entries: Iterable[str], contained: bool = False) -> str | None:
    """The first entry that means a name."""
    return next((entry for entry in entries if entry_matches(name, entry, contained)), None)


def dynamic_of(dynamic: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """What `dynamic` of a GPTQ config says of a name: its numbers, {} where nothing matches, None where it is not quantized."""
    for pattern, numbers in dynamic.items():
        if expression(re.sub(r"^[+-]:", "", pattern), "dynamic").match(name):
            return None if pattern.startswith("-:") else numbers
    return {}


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """A name with its prefix replaced, every rule in turn."""
    for old, new in prefixes.items():
        if name.startswith(old):
            name = new + name[len(old) :]
    return name


def shard_names(name: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """The members of a joined module, or the module itself."""
    leaf = name.rpartition(".")[2]
    return [name.replace(leaf, shard) for shard in packed.get(leaf, (leaf,))]
