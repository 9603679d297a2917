"""Which weight gets which number format: the rules of a recipe against the map of a model, and every complaint about them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import replace

from qwench import numerics
from qwench.formats import FORMATS, Container
from qwench.models.map import ROLES, Block, ModelMap, Slot
from qwench.numerics.scheme import Scheme
from qwench.recipe import Recipe, Rule, layer_range, suggestion

Complaint = tuple[str, str]

NEVER = {
    "router": "quantized routing sends tokens to other experts",
    "shared.router": "quantized routing breaks the shared expert's gate",
    "delta.a": "engines keep the decay projection in 16 bits",
    "delta.b": "engines keep the write-strength projection in 16 bits",
    "embed": "engines look rows up in it and expect 16 bits",
}


def assign(recipe: Recipe, map: ModelMap) -> tuple[dict[str, Scheme], list[str], list[Complaint]]:
    """Module -> scheme by the recipe's rules (later rules win), notes, and complaints about rules that cannot be meant."""
    schemes: dict[str, Scheme] = {}
    notes: list[str] = []
    complaints: list[Complaint] = []
    rules: Sequence[Rule] = recipe.quantize.rules if recipe.quantize else ()
    for number, rule in enumerate(rules, start=1):
        matched = 0
        for glob in rule.roles:
            slots = [s for s in map.slots() if _matches(glob, rule, s)]
            complaints += _rule_complaints(glob, slots, map, number)
            for slot in slots:
                if not slot.linear or slot.role.removeprefix("mtp.") in NEVER:
                    continue
                matched += 1
                scheme = _in_order(rule.resolved(), recipe)
                if scheme is None:
                    schemes.pop(slot.module, None)
                else:
                    schemes[slot.module] = scheme
        if not matched:
            complaints.append(
                (
                    f"rule {number} ({', '.join(rule.roles)}) names no weight of this {map.model_type} model",
                    "use roles that it has, see `qwench inspect`",
                )
            )
    return schemes, notes, complaints


def _in_order(scheme: Scheme | None, recipe: Recipe) -> Scheme | None:
    """The scheme as the recipe's method leaves it: GPTQ with dynamic order says which group each column is of, where there are groups."""
    step = recipe.quantize
    dynamic = step is not None and step.method == "gptq" and step.gptq.order == "dynamic"
    ordered = scheme is not None and dynamic and scheme.kind == "int" and scheme.group is not None
    return replace(scheme, ordered=True) if scheme is not None and ordered else scheme


def _matches(glob: str, rule: Rule, slot: Slot) -> bool:
    """Whether a rule's glob names a slot: a `*` does not reach into the MTP head or the tower, they are named."""
    for component in ("mtp.", "vision."):
        if slot.role.startswith(component) != glob.startswith(component):
            return False
    if not fnmatch.fnmatchcase(slot.role, glob):
        return False
    first, last = layer_range(rule.layers)
    if slot.layer is None:
        return rule.layers == "all"
    return first <= slot.layer and (last is None or slot.layer <= last)


def _rule_complaints(glob: str, slots: list[Slot], map: ModelMap, number: int) -> Iterator[Complaint]:
    known = [*ROLES, *(s.role for s in map.others if s.role.startswith("vision."))]
    if not fnmatch.filter(known, glob):
        meant = _role_of(glob, map)
        near = f" (did you mean {meant!r}?)" if meant else suggestion(glob, known)
        yield f"rule {number}: no role is named {glob!r}{near}", "see the roles in docs/recipes.md"
    elif "*" not in glob and slots and (glob.removeprefix("mtp.") in NEVER or not slots[0].linear):
        why = NEVER.get(glob.removeprefix("mtp."), "it is not the matrix of a linear layer")
        yield f"rule {number}: {glob} is never quantized: {why}", f"take {glob} out of the rule"


def _role_of(glob: str, map: ModelMap) -> str | None:
    """The role of the weights that a person names by their module: `q_proj`, `model.layers.*.mlp.gate_proj`."""
    last = glob.rpartition(".")[2].strip("*")
    mine = glob.startswith("mtp.")
    found = (s.role for s in map.slots() if last and s.module.rpartition(".")[2] == last and s.role.startswith("mtp.") == mine)
    return next(found, None)


def split_sets(block: Block, schemes: dict[str, Scheme]) -> Iterator[Complaint]:
    """Engines join these at load: members that differ are read wrongly without a word."""
    for name, members in block.fused.items():
        found = {s.role: schemes.get(s.module) for s in members}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{role}: {scheme.label if scheme else 'kept'}" for role, scheme in found.items())
            where = "mtp " if block.component == "mtp" else ""
            yield (
                f"{where}layer {block.index}: engines fuse {name}, and its members differ ({said})",
                f"give {', '.join(found)} one scheme",
            )


def shape_complaints(map: ModelMap, schemes: dict[str, Scheme], container: Container) -> Iterator[Complaint]:
    seen: set[tuple[str, Scheme]] = set()
    for slot, scheme in assigned(map, schemes):
        if (slot.role, scheme) in seen:
            continue
        if complaint := numerics.complaint(scheme, slot.shape):
            mend = f"keep {slot.role}, or choose a scheme whose group divides {slot.shape[1]}"
        elif complaint := container.complaint(scheme, slot.shape):
            mend = f"keep {slot.role}, or choose a scheme or an export format ({', '.join(FORMATS)}) that fit each other"
        if complaint:
            seen.add((slot.role, scheme))
            yield f"{slot.module} {list(slot.shape)}: {complaint}", mend


def input_complaints(map: ModelMap, schemes: dict[str, Scheme], recipe: Recipe) -> Iterator[Complaint]:
    """Activations that are rounded where nothing could find their range, or where our own reading of the release would not be that of an engine."""
    rounded = [slot for slot, scheme in assigned(map, schemes) if scheme.activations != "none"]
    outside = dict.fromkeys(
        slot.role for slot in rounded if (slot.layer is None and slot.role != "mtp.fc") or slot.role.startswith("vision.")
    )
    if outside:
        yield (
            f"{', '.join(outside)}: activations are rounded in decoder layers only, and in mtp.fc",
            "give these roles a scheme without activations, or keep them",
        )
    if rounded and recipe.correct:
        yield (
            "a low-rank correction reads what a layer reads, and engines give it the input as it was before rounding: its gain could not be measured",
            "take the correct step out, or choose schemes without activations",
        )


def assigned(map: ModelMap, schemes: dict[str, Scheme]) -> Iterator[tuple[Slot, Scheme]]:
    for slot in map.slots():
        if slot.module in schemes:
            yield slot, schemes[slot.module]
