"""The auto-round container with GPTQ's packing (`auto_round:auto_gptq`): what auto-round, transformers, vLLM and SGLang read. See docs/formats.md.

The tensors are those of GPTQ version 1 without `g_idx`: no reader of this container looks for an order of columns. Symmetric only, for the same
reasons as there; a scale may be negative, auto-round's own are (the value of largest magnitude lands on -8).

`block_name_to_quantize` says which stacks of layers are quantized, `extra_config` has what is different in them: by exact name or by regular
expression, which readers search for anywhere in a name; ours are anchored at both ends. vLLM renames exact names and leaves expressions alone. What lies
outside of the stacks is quantized only where `extra_config` names it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from qwench.checkpoint.source import TensorSpec
from qwench.errors import CheckpointError
from qwench.formats import gptq
from qwench.formats.gptq import CODES, SCALES, SUFFIXES, part_of, row_step, shape_of
from qwench.formats.matching import MTP, OTHER, TRUNK, patterns, place
from qwench.formats.order import MEND
from qwench.formats.quantization_config import by_stored_scheme, leading_scheme, whole_components
from qwench.numerics import Quantized, Scheme

__all__ = ["CODES", "METHOD", "SCALES", "SUFFIXES", "complaint", "layout", "notes", "pack", "part_of"]
__all__ += ["quantization_config", "row_step", "scheme_of", "shape_of", "sidecars", "unpack"]

METHOD = "auto-round"
PACKING = "auto_round:auto_gptq"
PREFIXES = {TRUNK: r"re:^(?:model\.|language_model\.)+layers\.", MTP: r"re:^mtp\.layers\."}
COMPONENTS = {"mtp": r"^mtp\..*", "vision": r"^(?:model\.)?visual\..*"}
KEPT: dict[str, Any] = {"bits": 16, "data_type": "fp"}
SPECIAL = re.compile(r"[*+?^$()\[\]{}|\\]")
"""What makes a key of `extra_config` an expression."""


def complaint(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """Why this container cannot hold a weight of this shape (out, in) in this scheme, or None."""
    if scheme.ordered:
        return "auto-round has no place for the order of columns: its readers would take every column for one of its neighbours' group"
    wrong = gptq.complaint(scheme, shape)
    return wrong and wrong.replace("gptq", METHOD, 1)


def notes(schemes: Iterable[Scheme]) -> list[str]:
    """What a person should know about a release with these schemes."""
    return []


def sidecars(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Files besides config.json: none."""
    return {}


def layout(module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str = "BF16") -> list[TensorSpec]:
    """The tensors that stand for one quantized weight; arguments as in `compressed_tensors.layout`."""
    return [spec for spec in gptq.layout(module, shape, scheme, dtype) if not spec.name.endswith(".g_idx")]


def pack(module: str, quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of one quantized weight by name, as `layout` lists them."""
    assert not quantized.scheme.ordered, "auto-round holds no order of columns"
    tensors = gptq.pack(module, quantized)
    del tensors[f"{module}.g_idx"]
    return tensors


def unpack(
    module: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, ...], config: Mapping[str, Any] | None = None
) -> Quantized:
    """The quantized weight that these tensors stand for; arguments and errors as in `gptq.unpack`."""
    return gptq.unpack(module, tensors, scheme, shape)


def quantization_config(assigned: Mapping[str, Scheme], kept: Collection[str]) -> dict[str, Any]:
    """What `config.json` says about a release; arguments as in `quantization_config.quantization_config`."""
    by_scheme = by_stored_scheme(assigned)
    base = leading_scheme(by_scheme)
    stacks = sorted({f"{m.partition('.layers.')[0]}.layers" for m in assigned if place(m).scope != OTHER})
    return numbers(base) | {
        "block_name_to_quantize": ",".join(stacks),
        "extra_config": _extra(assigned, kept, by_scheme, base),
        "packing_format": PACKING,
        "quant_method": METHOD,
    }


def numbers(scheme: Scheme) -> dict[str, Any]:
    """A scheme in the words of auto-round."""
    return {"bits": scheme.bits, "data_type": "int", "group_size": scheme.group or -1, "sym": scheme.symmetric}


def _extra(
    assigned: Mapping[str, Scheme], kept: Collection[str], by_scheme: Mapping[Scheme, list[str]], base: Scheme
) -> dict[str, dict[str, Any]]:
    """What the stacks and the base do not say: 16 bits for what is kept, numbers for what has others or stands outside."""
    components, rest = whole_components(assigned, kept)
    inside = [m for m in rest if place(m).scope != OTHER]
    entries = {COMPONENTS[c]: KEPT for c in components}
    entries |= {line[3:]: KEPT for line in patterns(inside, assigned, containers=True, scopes=PREFIXES)}
    for scheme, modules in by_scheme.items():
        stacked = [m for m in modules if place(m).scope != OTHER]
        others = [*kept, *(m for m in assigned if m not in set(modules))]
        lines = patterns(stacked, others, containers=True, scopes=PREFIXES) if scheme != base else []
        outside = [m for m in modules if place(m).scope == OTHER]
        entries |= {key: numbers(scheme) for key in (*(line[3:] for line in lines), *outside)}
    return entries


def scheme_of(config: Mapping[str, Any], module: str) -> Scheme | None:
    """The scheme of a module according to a quantization_config, ours or anybody's; None where it is not quantized.

    As auto-round decides: the exact name in `extra_config`, then the first expression found in the name, then the stacks.

    Raises:
        CheckpointError: a packing or numbers that we cannot read.
    """
    packing, data_type = config.get("packing_format", PACKING), config.get("data_type", "int")
    if packing != PACKING or data_type != "int":
        raise CheckpointError(
            f"the checkpoint is auto-round, {data_type} packed as {packing!r}", f"Qwench reads int packed as {PACKING}"
        )
    entry = _entry(config.get("extra_config") or {}, module)
    if entry is None and not _in_stacks(config, module):
        return None
    values = {**config, **(entry or {})}
    return None if values.get("bits", 16) >= 16 else gptq.read_numbers({**values, "desc_act": False}, module)


def _entry(extra: Mapping[str, Mapping[str, Any]], module: str) -> Mapping[str, Any] | None:
    if module in extra:
        return extra[module]
    for key, values in extra.items():
        try:
            if SPECIAL.search(key) and re.search(key, module):
                return values
        except re.error as error:
            raise CheckpointError(f"config.json: extra_config: {key!r} is no pattern: {error}", MEND) from None
    return None


def _in_stacks(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module lies in a stack of layers that is quantized; everywhere but in the head, where the config names none."""
    stacks = config.get("block_name_to_quantize") or config.get("to_quant_block_names")
    if not stacks:
        return not module.endswith("lm_head")
    names = stacks.split(",") if isinstance(stacks, str) else [n for s in stacks for n in ([s] if isinstance(s, str) else s)]
    return module.startswith(tuple(name.strip() for name in names))
