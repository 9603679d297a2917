"""The modules of a Qwen3.5 as an engine names and joins them, from the config alone.

The weights come from `models.tables`, one row each; an engine is told apart by its names (`Naming`) and by what it joins. Nothing here looks at stored tensors: an engine
builds what the config describes, and finds out while loading what is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwench.formats.matching import FUSED
from qwench.loading.parts import Kind, Member, Module
from qwench.models import tables
from qwench.models.claims import Claim
from qwench.models.geometry import Geometry, read_geometry
from qwench.models.vision import vision_claims

EXPERT = re.compile(r"^(?P<stem>.*mlp\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)$")
ALWAYS_PLAIN = ("mlp.gate", "mlp.shared_expert_gate")
"""Linear layers that engines build unquantized whatever the config says."""
MEMBER_OF = {member: fused for fused, members in FUSED.items() for member in members}
WEIGHT = ".weight"


@dataclass(frozen=True)
class Naming:
    """How an engine names a module of the checkpoint.

    Attributes:
        asked: checkpoint module -> the name that the quantization config is asked about.
        path: checkpoint module -> where the engine keeps it.
        fuses: whether q/k/v, gate/up and the projections of Gated DeltaNet are joined.
        unquantized: checkpoint modules that are built unquantized whatever the config says.
    """

    asked: Callable[[str], str]
    path: Callable[[str], str]
    fuses: bool = True
    unquantized: Callable[[str], bool] = lambda module: module.endswith(ALWAYS_PLAIN)


def decoder_claims(config: Mapping[str, Any], prefix: str) -> list[Claim]:
    """Every weight of the trunk under the checkpoint's prefix, experts one by one; the head only where it is not tied."""
    g = read_geometry(config)
    claims = list(tables.trunk_claims(g, prefix, head=not g.tied))
    for i, kind in enumerate(g.kinds):
        claims += tables.layer_claims(g, kind, f"{prefix}layers.{i}.", "", i, _single)
    return claims


def head_claims(config: Mapping[str, Any], layers: int) -> list[Claim]:
    """Every weight of an MTP head of so many layers, experts one by one; engines give it as many as the trunk has."""
    g: Geometry = read_geometry(config)
    claims = list(tables.mtp_claims(g))
    for i in range(layers):
        claims += tables.layer_claims(g, "full_attention", f"mtp.layers.{i}.", tables.MTP, i, _single)
    return claims


def tower_claims(config: Mapping[str, Any]) -> list[Claim]:
    """Every weight of the tower; nothing where the config has none."""
    vision = config.get("vision_config")
    return list(vision_claims(vision)) if isinstance(vision, Mapping) else []


def _single(_: str) -> tables.ExpertLayout:
    return "single"


def modules_of(claims: Iterable[Claim], naming: Naming) -> list[Module]:
    """The engine's modules, in the order of the claims; members of a joined one in the order in which they are stored."""
    gathered: dict[str, list[tuple[Claim, str]]] = {}
    for claim in claims:
        module = claim.tensor.removesuffix(WEIGHT)
        gathered.setdefault(_holder(module, claim, naming.fuses), []).append((claim, module))
    biases = {holder.removesuffix(".bias"): group for holder, group in gathered.items() if holder.endswith(".bias")}
    return [
        _module(holder, group, naming, biases.get(holder, []))
        for holder, group in gathered.items()
        if not holder.endswith(".bias")
    ]


def _holder(module: str, claim: Claim, fuses: bool) -> str:
    """The module of the checkpoint's name that this weight ends up in."""
    if found := EXPERT.match(module):
        return found["stem"]
    parent, _, leaf = module.rpartition(".")
    if fuses and leaf in MEMBER_OF and ".visual." not in f".{module}":
        return f"{parent}.{MEMBER_OF[leaf]}"
    return module


def _module(holder: str, group: list[tuple[Claim, str]], naming: Naming, biases: list[tuple[Claim, str]]) -> Module:
    members = tuple(_member(claim, module) for claim, module in group)
    extras = {"bias": biases[0][0].shape} if biases else {}
    configured = not naming.unquantized(holder)
    return Module(naming.asked(holder), naming.path(holder), _kind(holder, group[0][0]), members, configured, extras)


def _member(claim: Claim, module: str) -> Member:
    if found := EXPERT.match(module):
        return Member(found["leaf"], claim.shape, module, int(found["number"]))
    return Member(module.rpartition(".")[2] if claim.tensor.endswith(WEIGHT) else "", claim.shape, module)


def _kind(holder: str, claim: Claim) -> Kind:
    if claim.slots[0].expert is not None:
        return "experts"
    if holder.endswith("embed_tokens"):
        return "embedding"
    if holder == "lm_head":
        return "head"
    return "linear" if claim.slots[0].linear else "plain"


def leaves(modules: Iterable[Module]) -> Iterator[tuple[Module, Member]]:
    """Every member with its module."""
    for module in modules:
        for member in module.members:
            yield module, member
