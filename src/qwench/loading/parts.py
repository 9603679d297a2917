"""What an engine builds for a checkpoint, as far as loading goes: modules, their parameters, and where stored tensors end up.

An engine joins weights while it loads (q, k and v become one module, all experts of a layer another), so a parameter has parts, each of which one stored tensor
fills. A part that no tensor fills holds whatever memory held before: that is how a release goes wrong in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from qwench.loading.stored import Stored
from qwench.numerics import Scheme

Built = Scheme | Stored
"""How a quantized module is built: a scheme of ours in its container, or tensors that another writer's format lays down."""
Kind = Literal["linear", "experts", "head", "embedding", "plain"]
PartKey = str
"""A part of a parameter: a member's name (`q_proj`), with the expert before it (`7.gate_proj`), or "" where there is but one."""


@dataclass(frozen=True)
class Rule:
    """One thing that an engine does, and where it can be read.

    Attributes:
        name: a short name, as findings cite it.
        says: what the engine does.
        source: file and function in the engine's public repository, at the version of the table.
    """

    name: str
    says: str
    source: str


@dataclass(frozen=True)
class Member:
    """A stored weight inside a module.

    Attributes:
        leaf: its last name (`q_proj`), or of a bare parameter "".
        shape: its dimensions, (out, in) of a matrix.
        stored: its module in the checkpoint (`model.language_model.layers.3.self_attn.q_proj`).
        expert: its number, of a routed expert.
    """

    leaf: str
    shape: tuple[int, ...]
    stored: str
    expert: int | None = None

    @property
    def key(self) -> PartKey:
        return self.leaf if self.expert is None else f"{self.expert}.{self.leaf}"


@dataclass(frozen=True)
class Module:
    """A module as the engine builds it.

    Attributes:
        asked: the name under which it asks the quantization config.
        path: where its parameters lie.
        kind: what it is.
        members: the stored weights that it joins; one where it joins nothing.
        configured: whether the quantization config is asked at all; routers and gates are built unquantized whatever it says.
        extras: further stored parameters, by last name: a bias.
    """

    asked: str
    path: str
    kind: Kind
    members: tuple[Member, ...]
    configured: bool = True
    extras: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def fused(self) -> bool:
        return len({m.leaf for m in self.members}) > 1

    @property
    def leaf(self) -> str:
        return self.asked.rpartition(".")[2]


Shape = tuple[int, ...] | None
"""Dimensions that a stored tensor must have to fill a part; None: any."""


@dataclass
class Parameter:
    """A parameter and the parts of it that stored tensors fill.

    Attributes:
        parts: what is to be filled, with the shape of the stored tensor.
        filled: part -> the tensor that did.
        holds: the kind of numbers that it is made for, see `stored.KINDS`; empty where any will do.
        needed: whether an unfilled part matters; some parameters have values from the start.
        module: the module that it belongs to, as the quantization config is asked about it.
    """

    name: str
    parts: dict[PartKey, Shape]
    filled: dict[PartKey, str] = field(default_factory=dict)
    holds: str = ""
    needed: bool = True
    module: str = ""

    @property
    def missing(self) -> list[PartKey]:
        return [key for key in self.parts if key not in self.filled]


@dataclass(frozen=True)
class Into:
    """A tensor goes into parts of a parameter; `whole`: a tensor of all experts, which fills every part of those leaves."""

    parameter: str
    keys: tuple[PartKey, ...]
    whole: bool = False


@dataclass(frozen=True)
class Dropped:
    """A tensor is left out. `designed`: nothing is lost by it. `module`: the module that it was meant for, where that is known."""

    why: str
    designed: bool = False
    rule: str = ""
    module: str = ""


@dataclass(frozen=True)
class Refused:
    """The engine stops at a tensor or a module. `module`: the module that the tensor was meant for, where that is known."""

    where: str
    why: str
    rule: str = ""
    module: str = ""


class Stop(Exception):
    """An engine stops while it builds a module.

    Attributes:
        why: in words.
        rule: the name of the rule.
    """

    def __init__(self, why: str, rule: str) -> None:
        super().__init__(why)
        self.why, self.rule = why, rule


@dataclass(frozen=True)
class Cast:
    """A stored tensor of one kind of numbers that an engine copies into a parameter of another: its scales are not applied, or not there."""

    stored: str
    built: str
    module: str


Placed = Into | Dropped | Refused
Place = Callable[[str, tuple[int, ...]], "Placed | list[Into]"]
"""What becomes of a stored tensor, by its name and shape."""


@dataclass
class Model:
    """One network that the engine builds from the folder: the main model, or the one that drafts.

    Attributes:
        name: the engine's class.
        modules: what it is made of.
        schemes: how each module is built: module name -> scheme, None for an unquantized one.
        parameters: by name.
        place: what becomes of stored tensors.
        refusals: why it cannot be built.
    """

    name: str
    modules: list[Module]
    schemes: dict[str, Built | None]
    parameters: dict[str, Parameter]
    place: Place
    refusals: list[Refused] = field(default_factory=list)

    def built(self, module: Module) -> str:
        """How a module is built, in words: `as int4 g128`, `unquantized`."""
        built = self.schemes.get(module.asked)
        return f"as {built.label}" if built else "unquantized"


def refused_model(name: str, stop: Stop) -> Model:
    """An engine that stops at the config as a whole: nothing is built, and nothing is loaded."""
    return Model(
        name,
        [],
        {},
        {},
        lambda name, shape: Dropped("nothing is loaded"),
        [Refused("config.json", stop.why, stop.rule)],
    )


@dataclass
class Load:
    """What came of loading one model.

    Attributes:
        model: the engine's class.
        consumed: stored tensors that reached a parameter.
        dropped: stored tensors that reached none, and why.
        refusals: where the engine stops.
        misfits: stored tensor -> (its shape, the shape that its place has).
        misfit_modules: the modules of those.
        casts: stored tensors that are copied into numbers of another kind.
        unfilled: parameter -> parts that nothing filled.
        homes: parameter -> its module.
        schemes: module -> how it is built.
    """

    model: str
    consumed: set[str] = field(default_factory=set)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    refusals: list[Refused] = field(default_factory=list)
    misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    misfit_modules: set[str] = field(default_factory=set)
    casts: dict[str, Cast] = field(default_factory=dict)
    unfilled: dict[str, list[PartKey]] = field(default_factory=dict)
    homes: dict[str, str] = field(default_factory=dict)
    schemes: dict[str, Built | None] = field(default_factory=dict)
