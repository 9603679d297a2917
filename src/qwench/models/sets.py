"""What belongs together in a decoder layer: weights that read one input, weights that engines join, and where smoothing scales may move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

from qwench.models.geometry import LayerKind
from qwench.models.map import Block, Fold, Slot
from qwench.models.tables import MTP

Member = tuple[str, int | None]
"""(role without `mtp.`, expert)."""


def block_of(index: int, kind: LayerKind, component: Literal["text", "mtp"], slots: tuple[Slot, ...]) -> Block:
    """A decoder layer with its sets. Sets that lack a member (in a checkpoint that is complained about) are left out."""
    tag = MTP if component == "mtp" else ""
    by_role: dict[tuple[str, int | None], Slot] = {(s.role.removeprefix(tag), s.expert): s for s in slots}
    experts = sorted({s.expert for s in slots if s.expert is not None})

    def sets(named: Mapping[str, tuple[tuple[str, int | None], ...]]) -> dict[str, tuple[Slot, ...]]:
        found = {name: tuple(by_role[m] for m in members if m in by_role) for name, members in named.items()}
        return {name: members for name, members in found.items() if members and len(members) == len(named[name])}

    fused = sets(_fused(kind, experts))
    if experts:
        fused["experts"] = tuple(s for s in slots if s.expert is not None)
    return Block(index, kind, component, slots, sets(_inputs(kind, experts)), fused, _folds(tag, kind, by_role, bool(experts)))


def _members(*roles: str, expert: int | None = None) -> tuple[Member, ...]:
    return tuple((role, expert) for role in roles)


def _inputs(kind: LayerKind, experts: list[int]) -> dict[str, tuple[Member, ...]]:
    inputs: dict[str, tuple[Member, ...]] = {}
    if kind == "full_attention":
        inputs["attention"] = _members("attention.q", "attention.k", "attention.v")
        inputs["attention.o"] = _members("attention.o")
    else:
        inputs["delta"] = _members("delta.qkv", "delta.z", "delta.b", "delta.a")
        inputs["delta.out"] = _members("delta.out")
    if not experts:
        return inputs | {"mlp": _members("mlp.gate", "mlp.up"), "mlp.down": _members("mlp.down")}
    inputs["mlp"] = _members("router", "shared.router", "shared.gate", "shared.up")
    inputs["shared.down"] = _members("shared.down")
    for e in experts:  # an expert reads only the tokens that are sent to it
        inputs[f"experts.{e}"] = _members("expert.gate", "expert.up", expert=e)
        inputs[f"experts.{e}.down"] = _members("expert.down", expert=e)
    return inputs


def _fused(kind: LayerKind, experts: list[int]) -> dict[str, tuple[Member, ...]]:
    fused: dict[str, tuple[Member, ...]] = {}
    if kind == "full_attention":
        fused["qkv_proj"] = _members("attention.q", "attention.k", "attention.v")
    else:
        fused["in_proj_qkvz"] = _members("delta.qkv", "delta.z")
        fused["in_proj_ba"] = _members("delta.b", "delta.a")
    if not experts:
        return fused | {"gate_up_proj": _members("mlp.gate", "mlp.up")}
    fused["shared_expert.gate_up_proj"] = _members("shared.gate", "shared.up")
    return fused | {f"experts.{e}.gate_up_proj": _members("expert.gate", "expert.up", expert=e) for e in experts}


def _folds(tag: str, kind: LayerKind, by_role: Mapping[Member, Slot], moe: bool) -> tuple[Fold, ...]:
    """Norms into all that read them, values into what reads them, and each MLP's up into its down (the gate goes through SiLU, up only multiplies).

    What o reads are sums of values over positions, times the output gate, channel by channel: a scale on a channel of v passes through both. Not into
    GDN's out: its norm is one vector for all heads, and divides by the size of what it reads."""
    mlps = ("shared", "expert") if moe else ("mlp",)
    routers = ("router", "shared.router") if moe else ()
    wide = routers + tuple(f"{m}.{half}" for m in mlps for half in ("gate", "up"))
    found = [
        *_mixer_folds(kind, by_role),
        Fold("norm.post", wide, True),
        *(Fold(f"{m}.up", (f"{m}.down",), False) for m in mlps),
    ]
    return tuple(replace(f, source=tag + f.source, readers=tuple(tag + r for r in f.readers)) for f in found)


def _mixer_folds(kind: LayerKind, by_role: Mapping[Member, Slot]) -> Iterator[Fold]:
    if kind == "linear_attention":
        yield Fold("norm.input", ("delta.qkv", "delta.z", "delta.b", "delta.a"), True)
        return
    yield Fold("norm.input", ("attention.q", "attention.k", "attention.v"), True)
    if norm := by_role.get(("attention.q_norm", None)):  # as wide as a head; a checkpoint that lacks it is complained about
        yield Fold("attention.v", ("attention.o",), False, head=norm.shape[0])
