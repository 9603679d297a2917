"""The parameters that an engine allocates for a module, once it has decided how the module is quantized.

Names and shapes of stored tensors are those of the container (`formats.*.layout`) or of another writer's format (`stored`); experts of a layer lie in two parameters each, `w13_*` (gate and up)
and `w2_*` (down), in vLLM and SGLang alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qwench.formats import Container
from qwench.loading.parts import Built, Member, Module, Parameter, PartKey, Shape
from qwench.loading.stored import KINDS, Expected, Span, Stored

UNORDERED = ".g_idx"
"""Orders of columns are dropped by name, before parameters are looked for."""
SHARED = ("weight_shape", "pre_quant_scale")
"""Last names of tensors that the members of a module overwrite in turn: one of them is enough."""
UNSHAPED = ("weight_shape",)
"""Last names of tensors whose dimensions are not compared."""
HALVES = {"gate_proj": "w13", "up_proj": "w13", "down_proj": "w2"}


def expected_tensors(container: Container | None, member: Member, built: Built | None, span: Span) -> dict[str, Expected]:
    """Last name -> the tensors that a member is expected to be stored in."""
    if built is None:
        return {"weight" if member.leaf else "": Expected(member.shape)}
    assert len(member.shape) == 2
    shape = (member.shape[0], member.shape[1])
    if isinstance(built, Stored):
        return built.lay(shape, span)
    assert container is not None
    specs = {spec.name.removeprefix(f"{member.stored}."): spec for spec in container.layout(member.stored, shape, built)}
    return {
        suffix: Expected(None if suffix in UNSHAPED else spec.shape, KINDS.get(spec.dtype, ""))
        for suffix, spec in specs.items()
        if suffix != UNORDERED[1:]
    }


@dataclass
class _Gathered:
    """A parameter while its members are gone through."""

    parts: dict[PartKey, Shape] = field(default_factory=dict)
    holds: str = ""
    needed: bool = True


def parameters_of(module: Module, container: Container | None, built: Built | None) -> Iterator[Parameter]:
    """Every parameter of a module with the parts that stored tensors are to fill."""
    found: dict[str, _Gathered] = {}
    for member, span in zip(module.members, spans(module), strict=True):
        for suffix, expected in expected_tensors(container, member, built, span).items():
            at = found.setdefault(parameter_name(module, member.leaf, suffix), _Gathered())
            at.parts[part_key(module, member, suffix)] = expected.shape
            at.holds, at.needed = expected.holds, expected.needed
    for suffix, shape in module.extras.items():
        found[f"{module.path}.{suffix}"] = _Gathered({"": shape}, "float")
    for name, made in found.items():
        yield Parameter(name, made.parts, holds=made.holds, needed=made.needed, module=module.asked)


def spans(module: Module) -> Iterator[Span]:
    """Where each member's rows lie in its module; of experts, which have a matrix each, every one begins anew."""
    rows = [member.shape[0] if member.shape else 0 for member in module.members]
    for number, mine in enumerate(rows):
        alone = module.kind == "experts"
        yield Span(0 if alone else sum(rows[:number]), mine if alone else sum(rows))


def parameter_name(module: Module, leaf: str, suffix: str) -> str:
    """`...qkv_proj.weight_scale`, `...experts.w13_weight_scale`, or of a bare parameter its path."""
    if module.kind == "experts":
        return f"{module.path}.{HALVES[leaf]}_{suffix}"
    return f"{module.path}.{suffix}" if suffix else module.path


def part_key(module: Module, member: Member, suffix: str) -> PartKey:
    """The part of a parameter that this tensor of this member fills."""
    if suffix in SHARED:
        return "" if member.expert is None else f"{member.expert}"
    return member.key if module.fused or member.expert is not None else ""
