"""Questions that several engines ask of a quantization_config in the same words, and the few that they read in it alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qwench.errors import CheckpointError
from qwench.formats.gptq import read_numbers
from qwench.loading.parts import Stop
from qwench.numerics import Scheme

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


def all_or_none(name: str, found: Sequence[bool], where: str, rule: str) -> bool:
    """What holds of a joined module whose members were asked one by one. Raises Stop where they differ."""
    if any(found) and not all(found):
        raise Stop(f"some of its members are {where} and some are not", rule)
    return all(found)


def skipped(
    name: str, packed: Mapping[str, Sequence[str]], means: Callable[[str], bool], rule: str, joined_first: bool = True
) -> bool:
    """Whether a list of what is not quantized means a module: itself, or where it is joined all of its members.

    Args:
        means: whether the list means a name.
        joined_first: the joined name is asked for before its members.

    Raises:
        Stop: it means some members and not others.
    """
    members = shard_names(name, packed)
    if members == [name] or (joined_first and means(name)):
        return means(name)
    return all_or_none(name, [means(member) for member in members], "in the list of what is not quantized", rule)


GPTQ_NUMBERS = {(4, True), (8, True)}


def gptq_numbers(values: Mapping[str, Any], name: str, reads: str) -> Scheme:
    """The scheme of symmetric integers of 4 and 8 bits. `reads`: who reads those, for the message. Raises Stop for others."""
    gptq_checked(values, reads)
    return read_numbers(dict(values), name)


def gptq_checked(values: Mapping[str, Any], reads: str) -> None:
    """Raises Stop unless the numbers are symmetric integers of 4 or 8 bits."""
    if (values.get("bits"), values.get("sym")) not in GPTQ_NUMBERS:
        raise Stop(f"{values.get('bits')} bits, sym {values.get('sym')}: {reads} symmetric 4 and 8 bits", "gptq-numbers")


def auto_round_numbers(config: Mapping[str, Any], entry: Mapping[str, Any], quantized: bool) -> dict[str, Any]:
    """Bits, group and symmetry of a module of an auto-round file: its entry of `extra_config` over those of the file, or over 16 bits where the file does not quantize it."""
    base = {"bits": config.get("bits"), "group_size": config.get("group_size"), "sym": config.get("sym", True)}
    values = base if quantized else {"bits": 16, "group_size": -1, "sym": True}
    return {key: entry.get(key, value) for key, value in values.items()}


def auto_round_stacks(config: Mapping[str, Any]) -> list[str]:
    """The stacks of layers that an auto-round file quantizes, from a list, a list of lists or a line with commas."""
    stacks = config.get("block_name_to_quantize") or config.get("to_quant_block_names") or ()
    return stacks.split(",") if isinstance(stacks, str) else flat(stacks)


def flat(names: Any) -> list[str]:
    """The names in a list of names or of lists of them."""
    return [leaf for name in names for leaf in ([name] if isinstance(name, str) else flat(name))]


def agreeing(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of a joined module from those of its members. Raises Stop where they differ."""
    if any(values != found[0] for values in found):
        raise Stop("its members have different numbers in `extra_config`", "inc-all-or-none")
    return found[0]
