"""What a replay means for the person who wants to run the file: findings in plain words, each with what mends it.

| kind     | what happens                                                                            |
|----------|-----------------------------------------------------------------------------------------|
| refuses  | the engine stops with an error                                                          |
| random   | it runs, and a parameter holds whatever memory held                                     |
| lost     | it runs, and a stored tensor is not used                                                |
| unknown  | the engine reads the format, and was not played through for it: nothing can be told      |
| wrong    | it runs, and computes something else than what is stored                                |
| note     | nothing goes wrong, and it is worth knowing                                             |

A part that is lost and the parameter that therefore stays random are told once, as what is random.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qwench.loading.parts import Load, Refused, Rule
from qwench.models.claims import summary

Level = Literal["refuses", "random", "lost", "wrong", "unknown", "note"]
LEVELS: tuple[Level, ...] = ("refuses", "random", "wrong", "lost", "unknown", "note")
"""In the order in which they are told."""


@dataclass(frozen=True)
class Finding:
    """One thing that goes wrong.

    Attributes:
        level: see above.
        where: the engine's class, or what was looked at.
        what: in words, with names and numbers.
        mend: what to do about it.
        names: the stored tensors or the engine's modules that it is about.
        rule: what the engine does, and where that is written; empty where nothing of the engine's is cited.
    """

    level: Level
    where: str
    what: str
    mend: str
    names: tuple[str, ...] = ()
    rule: str = ""


@dataclass(frozen=True)
class Proof:
    """What would come of a checkpoint in one engine.

    Attributes:
        engine, version: whose rules were played through.
        models: the classes that it builds.
        consumed: stored tensors that reach a parameter.
        findings: what goes wrong, worst first.
        notes: what could not be looked at.
    """

    engine: str
    version: str
    models: tuple[str, ...]
    consumed: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return all(finding.level == "note" for finding in self.findings)


HEAD = "MTP"
DOCTOR = "`qwench doctor --fix` does"
LISTS = "the list of what is not quantized (`ignore`; of GPTQ a `-:` pattern in `dynamic`; `modules_to_not_convert`; `exclude_modules`)"
ALL_EXPERTS = "no config mends it: this engine quantizes all experts of a GPTQ file. Quantize those that are kept too, use auto-round or compressed-tensors there, or do not draft where it is the head's"


def findings_of(loads: Sequence[Load], rules: Iterable[Rule]) -> list[Finding]:
    """What went wrong in the loads of an engine, worst first."""
    cited = {rule.name: f"{rule.says} ({rule.source})" for rule in rules}
    consumed = set().union(*(load.consumed for load in loads))
    found = [
        f
        for load in loads
        for f in (
            *_refusals(load, cited), *_random(load, cited), *_misfits(load), *_casts(load, cited), *_lost(load, consumed, cited),
        )
    ]  # fmt: skip
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _refusals(load: Load, cited: Mapping[str, str]) -> Iterator[Finding]:
    alike: dict[tuple[str, str], list[Refused]] = {}
    for refusal in load.refusals:
        alike.setdefault((_anonymous(refusal.why), refusal.rule), []).append(refusal)
    for (_, rule), group in alike.items():
        names = tuple(refusal.where for refusal in group)
        more = f" (and {len(group) - 1} more alike)" if len(group) > 1 else ""
        what = f"{load.model} stops: {group[0].where}: {group[0].why}{more}"
        mend = ALL_EXPERTS if rule == "gptq-experts" else mend_of(group[0].why)
        yield Finding("refuses", load.model, what, mend, names, cited.get(rule, ""))


def _anonymous(text: str) -> str:
    return re.sub(r"\S*\.\S+|'\w+'", "*", text)


def mend_of(why: str) -> str:
    """What to do about a module that the engine builds another way than it is stored, or not at all."""
    if "unquantized and has no" in why:
        return (
            f"config.json does not say, under the engine's name, that this module is quantized: write names that fit; {DOCTOR}"
        )
    if "is built as" in why and why.endswith("has no 'input_scale'"):
        return f"config.json says that each token has a scale of its own, and the file holds one for all: {OTHER_FORMAT}"
    if "is built as" in why and not re.search(r"has no '?weight'?$", why):
        return "the file has a name that nothing looks for: fetch it again, or make the release again"
    if "is built as" in why:
        return f"the file holds this module unquantized: put it into {LISTS}; {DOCTOR}"
    if "blocks of" in why:
        return f"this module cannot be in these blocks: where the file holds it unquantized, put it into {LISTS} ({DOCTOR}); else make the release again"
    if "some of its members" in why or "different numbers" in why:
        return f"name all members of the joined module alike; where they are stored alike, {DOCTOR}"
    if "no module or parameter" in why:
        return (
            "use the config.json (its `architectures`) that belongs to these tensors, or make the release in the other layout"
        )
    if "config.json says" in why:
        return "prune the MTP head with its trunk (a recipe with `prune:` does), or leave it out"
    if "neither" in why or "no target means it" in why:
        return f"put it into `ignore`; {DOCTOR}"
    return "make the release again in a format that this engine and version read: see docs/formats.md"


@dataclass(frozen=True)
class _Gap:
    """How a module is left uninitialized, without its name: alike ones are told once."""

    built: str
    missing: tuple[str, ...]
    whole: bool
    rule: str
    stored: tuple[str, ...]
    cast: bool = False


def _random(load: Load, cited: Mapping[str, str]) -> Iterator[Finding]:
    """Modules with memory that nothing fills, and what the file has for them instead."""
    stored: dict[str, dict[str, str]] = {}
    for name, dropped in load.dropped.items():
        if dropped.module:
            stored.setdefault(dropped.module, {})[name] = dropped.rule
    alike: dict[_Gap, list[str]] = {}
    example: dict[_Gap, str] = {}
    stopped = {refusal.module for refusal in load.refusals} | load.misfit_modules
    for module, parameters in _by_module(load).items():
        if module in stopped:
            continue
        cast = [name for name, found in load.casts.items() if found.module == module and found.stored == "float"]
        mine = stored.get(module, {}) or dict.fromkeys(cast, "")
        whole = all(parameter in load.unfilled for parameter, home in load.homes.items() if home == module)
        scheme = load.schemes.get(module)
        gap = _Gap(
            scheme.label if scheme else "unquantized", () if whole else tuple(p.rpartition(".")[2] for p in parameters), whole,
            next(iter(mine.values()), ""), tuple(sorted({n.rpartition(".")[2] for n in mine})), bool(cast),
        )  # fmt: skip
        alike.setdefault(gap, []).append(module)
        example.setdefault(gap, _parts(load, parameters))
    for gap, modules in alike.items():
        yield Finding(
            "random",
            load.model,
            _gap_told(load, gap, modules, example[gap]),
            _gap_mend(gap),
            tuple(modules),
            cited.get(gap.rule, ""),
        )


def _by_module(load: Load) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for parameter in load.unfilled:
        found.setdefault(load.homes.get(parameter, parameter), []).append(parameter)
    return found


def _parts(load: Load, parameters: Sequence[str]) -> str:
    parts = [part for part in load.unfilled[parameters[0]] if part]
    return f" of {', '.join(parts[:3])}{' ...' if len(parts) > 3 else ''}" if parts else ""


def _gap_told(load: Load, gap: _Gap, modules: Sequence[str], example: str) -> str:
    many = f"{len(modules)} modules" if len(modules) > 1 else "a module"
    what = "all" if gap.whole else f"{', '.join(gap.missing)}{example}"
    fate = "is unquantized, and would be cast" if gap.cast else "would be dropped"
    has = f", and the file's {', '.join(gap.stored)} {fate}" if gap.stored else ", and the file holds nothing for it"
    return f"{load.model}: {many} would run on whatever memory held ({what}): {summary(modules)}: built {_as(gap.built)}{has}"


def _as(built: str) -> str:
    return built if built == "unquantized" else f"as {built}"


def _gap_mend(gap: _Gap) -> str:
    if gap.rule == "head-members":
        return f"put `re:^mtp.*` into `ignore` beside the names (this version knows the head's joined modules by their joined names only); {DOCTOR}"
    if gap.rule == "gptq-experts":
        return ALL_EXPERTS
    if gap.rule == "head-fc":
        return "keep mtp.fc unquantized: make the release again"
    if gap.rule == "fused-for-good":
        return "store kept experts one by one like the quantized ones: make the release again"
    if gap.rule == "awq-no-experts":
        return "use vLLM or SGLang: transformers has no module for these experts"
    if gap.cast:
        return mend_of("is built as x and has no 'weight'")
    if gap.stored and gap.built == "unquantized":
        return mend_of("unquantized and has no")
    if gap.stored == ("weight",):
        return mend_of("is built as x and has no 'weight'")
    return "fetch the file again, or make the release again: what the engine needs is not stored under a name that it looks for"


def _misfits(load: Load) -> Iterator[Finding]:
    """Shapes that stop the engine, told once for each way in which they do not fit."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name, shapes in load.misfits.items():
        cast = load.casts.get(name)
        alike.setdefault(("" if cast else str(shapes), cast.stored if cast else "", cast.built if cast else ""), []).append(
            name
        )
    for (_, held, built), names in alike.items():
        stored, expected = load.misfits[names[0]]
        kind = {("float", built): " and unquantized", (held, "float"): " and quantized"}.get((held, built), "") if held else ""
        first = f" ({names[0]})" if len(names) > 1 else ""
        what = f"{load.model} stops: {summary(names)} is {list(stored)}{kind}, there is room for {list(expected)}{first}"
        yield Finding("refuses", load.model, what, _misfit_mend(load, names, held, built), tuple(names))


def _misfit_mend(load: Load, names: Sequence[str], held: str, built: str) -> str:
    if held:
        return mend_of("unquantized and has no" if built == "float" else "is built as x and has no 'weight'")
    if HEAD in load.model and any(name.endswith("mlp.gate.weight") or ".experts." in name for name in names):
        return mend_of("config.json says")
    if all(name.endswith("_scale_inv") for name in names):
        return mend_of("blocks of")
    return f"config.json and file disagree on bits or sizes; patterns must also name what engines join (qkv_proj, gate_up_proj, in_proj_qkvz); {DOCTOR}"


def _casts(load: Load, cited: Mapping[str, str]) -> Iterator[Finding]:
    """Codes that are copied into a plain parameter: the scales that they need have no place there."""
    told = _told(load)
    alike: dict[tuple[str, str], list[str]] = {}
    for name, found in load.casts.items():
        if found.module not in told and name not in load.misfits:
            alike.setdefault((found.stored, found.built), []).append(name)
    for (stored, built), names in alike.items():
        words = {"float": "16 or 32 bits", "fp8": "FP8 codes", "bytes": "integer or packed codes"}
        codes = "float" not in (stored, built)
        then = "where they stand for other numbers" if codes else "and no scale is applied"
        what = f"{load.model}: {summary(names)}: {words[stored]} are copied into a parameter of {words[built]}, {then}"
        rule = _always_plain(names, cited) if built == "float" else ""
        mend = (
            OTHER_FORMAT
            if codes
            else KEEP
            if rule
            else mend_of("unquantized and has no" if built == "float" else "is built as x and has no 'weight'")
        )
        yield Finding("wrong", load.model, what, mend, tuple(names), rule or cited.get("cast", ""))


OTHER_FORMAT = "config.json says another format than the files hold: use the config.json that belongs to these tensors"
KEEP = "no config mends it, since this engine builds these modules unquantized whatever it says: keep them unquantized, and make the release again"


def _always_plain(names: Sequence[str], cited: Mapping[str, str]) -> str:
    """The rule by which an engine never quantizes these; empty where it is not so. Only SGLang has one for the tower, and with it the head's first layer."""
    plain = cited.get("tower-plain", "")
    if plain and all(".visual." in name for name in names):
        return plain
    return cited["head-fc"] if plain and all(name.startswith("mtp.fc.") for name in names) else ""


def _told(load: Load) -> set[str]:
    """Modules and tensors that other findings speak of already."""
    refused = {name for refusal in load.refusals for name in (refusal.where, refusal.module) if name}
    return {*_by_module(load), *load.misfit_modules, *refused}


def _lost(load: Load, consumed: set[str], cited: Mapping[str, str]) -> Iterator[Finding]:
    """Tensors that no model took and that were not left out by design; told only where nothing else tells it already."""
    told = _told(load) | {found.module for found in load.casts.values()}
    alike: dict[tuple[str, str], list[str]] = {}
    for name, dropped in load.dropped.items():
        if name not in consumed and not dropped.designed and dropped.module not in told and load.schemes:
            alike.setdefault((_anonymous(dropped.why), dropped.rule), []).append(name)
    for (_, rule), names in alike.items():
        many = f"{len(names)} stored tensors" if len(names) > 1 else "a stored tensor"
        what = f"{load.model}: {many} would be dropped without a word: {summary(names)}: {load.dropped[names[0]].why}"
        unused = "nothing uses these tensors in this engine: remove them, or use the config.json that belongs to them"
        mend = "use vLLM or SGLang, which round the inputs of experts" if rule == "ct-experts-inputs" else unused
        yield Finding("lost", load.model, what, mend, tuple(names), cited.get(rule, ""))
