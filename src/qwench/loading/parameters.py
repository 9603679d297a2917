"""The parameters that an engine allocates for a module, once it has decided how the module is quantized.

Names and shapes of stored tensors are those of the container (`formats.*.layout`); experts of a layer lie in two parameters each, `w13_*` (gate and up) and `w2_*` (down), in vLLM
and SGLang alike.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwench.formats import Container
from qwench.loading.parts import Member, Module, Parameter, PartKey, Shape
from qwench.numerics import Scheme

UNORDERED = ".g_idx"
"""Orders of columns are dropped by name, before parameters are looked for."""
SHARED = ("weight_shape",)
"""Last names of tensors that the members of a module overwrite in turn: one of them is enough."""
HALVES = {"gate_proj": "w13", "up_proj": "w13", "down_proj": "w2"}


def stored_shapes(container: Container | None, member: Member, scheme: Scheme | None) -> dict[str, Shape]:
    """Last name -> dimensions of the tensors that a member is expected to be stored in."""
    if scheme is None or container is None:
        return {"weight" if member.leaf else "": member.shape}
    assert len(member.shape) == 2
    specs = container.layout(member.stored, (member.shape[0], member.shape[1]), scheme)
    named = {spec.name.removeprefix(f"{member.stored}."): spec.shape for spec in specs}
    return {suffix: None if suffix in SHARED else shape for suffix, shape in named.items() if suffix != UNORDERED[1:]}


def parameters_of(module: Module, container: Container | None, scheme: Scheme | None) -> Iterator[Parameter]:
    """Every parameter of a module with the parts that stored tensors are to fill."""
    found: dict[str, dict[PartKey, Shape]] = {}
    for member in module.members:
        for suffix, shape in stored_shapes(container, member, scheme).items():
            name = parameter_name(module, member.leaf, suffix)
            found.setdefault(name, {})[part_key(module, member, suffix)] = shape
    for suffix, shape in module.extras.items():
        found[f"{module.path}.{suffix}"] = {"": shape}
    for name, parts in found.items():
        yield Parameter(name, parts, module=module.asked)


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
