"""What engines join must agree: one scheme, one NVFP4 divisor, one order of columns. A joined module has room for one of each. Of FP8 with one scale for a weight they make one scale for all, which is told.

Schemes are compared from the config; divisors and orders are values, of which only those few are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.source import TensorEntry
from qwench.errors import CheckpointError
from qwench.formats import Container
from qwench.loading.findings import Finding, Level
from qwench.loading.parts import Model, Module
from qwench.models.claims import summary

Read = Callable[[str], Tensor]
GLOBALS, ORDER = ("weight_global_scale", "weight_scale_2"), "g_idx"
"""The outer scale of NVFP4, as compressed-tensors stores it (a divisor) and as ModelOpt does (a factor)."""
DIVISORS = "where the engine runs at all it keeps the largest, and the others' weights come out scaled: make the release again with one global scale for what engines join"
STEP = "weight_scale"
"""The scale of a weight that has but one."""
AGAIN = "nothing has to be done: where it rounds inputs too, the engine rounds these weights once more, to the largest of the scales; one scale for each row (FP8_DYNAMIC) spares that"
PAIRS = ("gate_proj", "up_proj")


def disagreements(
    models: Iterable[Model],
    tensors: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    container: Container | None,
    read: Read | None,
    refuses_divisors: bool = False,
) -> Iterator[Finding]:
    """Every joined module whose members differ.

    Args:
        read: reads a stored tensor; None where there are only headers, and values are not compared.
        refuses_divisors: the engine stops where global scales differ, where others take the largest.
    """
    for model in models:
        schemes: dict[str, str] = {}
        divisors: dict[str, str] = {}
        orders: dict[str, str] = {}
        steps: dict[str, str] = {}
        for module in model.modules:
            for name, members in joined(module):
                if container and (told := _schemes(members, tensors, config, container)):
                    schemes[name] = told
                if read and (told := _divisors(members, tensors, read)):
                    divisors[name] = told
                if read and (told := _orders(members, tensors, read)):
                    orders[name] = told
                if read and (told := _steps(members, tensors, read)):
                    steps[name] = told
        yield from _told(
            model, schemes, "are stored in different schemes", "make the release again with one scheme for what engines join"
        )
        yield from _told(model, divisors, "have different global scales", DIVISORS, "refuses" if refuses_divisors else "wrong")
        yield from _told(model, steps, "have one scale each, and not the same", AGAIN, "note")
        yield from _told(
            model,
            orders,
            "have their columns in different orders",
            "engines keep one order: make the release again with one order for what engines join",
        )


def joined(module: Module) -> Iterator[tuple[str, list[str]]]:
    """The sets of stored modules that one parameter holds together: a joined layer's members, gate and up of every expert."""
    if module.kind == "experts":
        pairs: dict[int, list[str]] = {}
        for member in module.members:
            if member.leaf in PAIRS and member.expert is not None:
                pairs.setdefault(member.expert, []).append(member.stored)
        yield from ((f"{module.asked}.{expert}", stored) for expert, stored in pairs.items())
    elif module.fused:
        yield module.asked, [member.stored for member in module.members]


def _told(model: Model, found: Mapping[str, str], what: str, mend: str, level: Level = "wrong") -> Iterator[Finding]:
    if found:
        first = next(iter(found))
        many = f"{len(found)} joined modules" if len(found) > 1 else "a joined module"
        told = f"{model.name}: members of {many} {what}: {summary(found)}; of {first}: {found[first]}"
        yield Finding(level, model.name, told, mend, tuple(found))


def _schemes(
    members: list[str], tensors: Mapping[str, TensorEntry], config: Mapping[str, Any], container: Container
) -> str | None:
    """How the stored schemes of members differ; one that is stored quantized and that the config is silent about says nothing."""
    labels: dict[str, str] = {}
    for member in members:
        leaf = member.rpartition(".")[2]
        if f"{member}.{container.SCALES}" in tensors:
            try:
                scheme = container.scheme_of(config["quantization_config"], member)
            except CheckpointError:
                continue
            if scheme is not None:
                labels[leaf] = scheme.label
        elif f"{member}.weight" in tensors:
            labels[leaf] = "unquantized"
    return ", ".join(f"{leaf} {label}" for leaf, label in labels.items()) if len(set(labels.values())) > 1 else None


def _divisors(members: list[str], tensors: Mapping[str, TensorEntry], read: Read) -> str | None:
    stored = {m: f"{m}.{last}" for m in members for last in GLOBALS if f"{m}.{last}" in tensors}
    return _differing(stored, read)


def _steps(members: list[str], tensors: Mapping[str, TensorEntry], read: Read) -> str | None:
    codes = [m for m in members if (weight := tensors.get(f"{m}.weight")) and weight.dtype == "F8_E4M3"]
    stored = {m: f"{m}.{STEP}" for m in codes}
    return _differing({m: name for m, name in stored.items() if name in tensors and tensors[name].shape in ((), (1,))}, read)


def _differing(stored: Mapping[str, str], read: Read) -> str | None:
    """The numbers of members, by the tensor that holds each, where they are not the same."""
    values = {member.rpartition(".")[2]: float(read(name)) for member, name in stored.items()}
    return None if len(set(values.values())) < 2 else ", ".join(f"{name} {value:g}" for name, value in values.items())


def _orders(members: list[str], tensors: Mapping[str, TensorEntry], read: Read) -> str | None:
    orders = {m.rpartition(".")[2]: read(f"{m}.{ORDER}") for m in members if f"{m}.{ORDER}" in tensors}
    first = next(iter(orders.values()), None)
    differing = [name for name, order in orders.items() if first is not None and not torch.equal(order, first)]
    return f"{', '.join(differing)} differ from {next(iter(orders))}" if differing else None
