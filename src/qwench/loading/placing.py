"""Where stored tensors belong in a model: what every engine's rules for names have in common.

An engine first gives a stored name the name that its modules were described with (its prefixes, its renamings), and decides what it leaves out; then all of them ask the same questions: is it a tensor
of all experts at once, is it a tensor of a module that exists, and has that module, built as it is, a parameter for it? What they do where the answer is no, differs, and stays with them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwench.loading.parameters import HALVES, parameter_name, part_key
from qwench.loading.parts import Dropped, Into, Member, Model, Module

EXPERT = re.compile(r"^(?P<holder>.*\.mlp\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)\.(?P<suffix>\w+)$")
STACKED = re.compile(r"^(?P<holder>.*\.mlp\.experts)\.(?P<leaf>gate_up_proj|down_proj)(?P<suffix>_scale_inv)?$")
"""A tensor of all experts of a layer, or the block scales of one."""
CACHE_SCALE = re.compile(r"\.self_attn\.(?:[kv]_proj\.)?[kv]_scale$")
"""A scale of a quantized cache, beside the projection that fills it or beside both."""


@dataclass(frozen=True)
class Found:
    """A stored tensor's module, its member there, and the tensor's last name (empty for a bare parameter)."""

    module: Module
    member: Member
    suffix: str


class Index:
    """The stored names that a model knows.

    Attributes:
        model: whose.
        holders: stored name of a module that holds experts -> the engine's.
        refused: modules that could not be built.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.refused = {refusal.where for refusal in model.refusals}
        self.holders: dict[str, Module] = {}
        self._at: dict[str, tuple[Module, Member]] = {}
        for module in model.modules:
            for member in module.members:
                self._at[member.stored] = module, member
                if member.expert is not None:
                    self.holders[member.stored.partition(".mlp.experts.")[0] + ".mlp.experts"] = module

    def find(self, known: str) -> Found | None:
        """The module of a tensor, by the name that the modules were described with."""
        if known in self._at:
            return Found(*self._at[known], "")
        stem, _, suffix = known.rpartition(".")
        return Found(*self._at[stem], suffix) if stem in self._at else None

    def left(self, module: Module, rule: str = "") -> Dropped | None:
        """What becomes of a tensor of a module that could not be built; None where it was."""
        return Dropped(f"{module.asked} is refused", rule=rule, module=module.asked) if module.asked in self.refused else None

    def room(self, found: Found) -> Into | None:
        """The place of one tensor; None where its module has no parameter of that name."""
        module, suffix = found.module, found.suffix
        if suffix in module.extras:
            return Into(f"{module.path}.{suffix}", ("",))
        parameter = self.model.parameters.get(parameter_name(module, found.member.leaf, suffix))
        return Into(parameter.name, (part_key(module, found.member, suffix),)) if parameter else None

    def all_experts(self, module: Module, leaf: str, suffix: str, shape: tuple[int, ...]) -> Into | tuple[int, ...] | None:
        """The place of one tensor of all experts, [E, 2I, D] or [E, D, I], or of their block scales; the shape that it should have where it has another; None where there is no parameter for it."""
        wanted = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        parameter = self.model.parameters.get(f"{module.path}.{HALVES[wanted[0]]}_weight{suffix}")
        if parameter is None:
            return None
        keys = tuple(key for key in parameter.parts if key.rpartition(".")[2] in wanted)
        one = parameter.parts[keys[0]]
        expected = (len(keys) // len(wanted), one[0] * len(wanted), *one[1:]) if one else ()
        return Into(parameter.name, keys, whole=True) if shape == expected else expected
