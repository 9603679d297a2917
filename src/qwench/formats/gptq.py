"""The GPTQ container, version 1: what GPTQModel, vLLM, SGLang and auto-round read. See docs/formats.md.

| tensor of one module (out, in) | dtype        | shape                 |                                                             |
|--------------------------------|--------------|-----------------------|-------------------------------------------------------------|
| `qweight`                      | I32          | [in * bits / 32, out] | codes + 2^(bits-1), packed down a column, lowest row lowest |
| `qzeros`                       | I32          | [groups, out*bits/32] | zero points less one: 0x77777777, or 0x7f7f7f7f for 8 bits  |
| `scales`                       | of the model | [groups, out]         |                                                             |
| `g_idx`                        | I32          | [in]                  | the group of each column                                    |

value = (stored code - (stored zero + 1)) * scale. Version 2 stores the zero points themselves; we read both and write the first. Only
symmetric numbers are written: a zero point of 0 has no place in version 1, and its readers disagree about what stands there instead.

One scheme is the rule, and `dynamic` has the exceptions: `+:` patterns with other numbers, `-:` patterns for what is not quantized, the first
that matches decides. GPTQModel compares them with the names of the checkpoint, vLLM and SGLang with the names of what they fuse, and nobody
translates: see `matching` for patterns that fit all. vLLM builds the layers of the MTP head unquantized as soon as any `-:` pattern has the
letters `mtp` in it; where a part of the head is quantized the others are spelled `m[t]p`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.source import TORCH_DTYPE, Part, TensorEntry, TensorSpec
from qwench.errors import CheckpointError
from qwench.formats.bits import WORD_BITS, pack_words, unpack_words
from qwench.formats.matching import MTP, SCOPES, TRUNK, patterns
from qwench.formats.order import MEND, column_groups, order_of
from qwench.formats.quantization_config import by_stored_scheme, leading_scheme, whole_components
from qwench.numerics import Quantized, Scheme

METHOD = "gptq"
VERSION_1, VERSION_2 = "gptq", "gptq_v2"
CODES = ("qweight",)
SCALES = "scales"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
"""Names of tensors that only a quantized module has."""

PREFIXES = {TRUNK: r"re:(?:model\.|language_model\.)+layers\.", MTP: SCOPES[MTP]}
"""What patterns begin with. They say what the trunk is, not what it is not: the letters `mtp` must not be in them."""
COMPONENTS = {"mtp": r"re:mtp\..*", "vision": r"re:(?:model\.)?visual\..*"}


def complaint(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """Why this container cannot hold a weight of this shape (out, in) in this scheme, or None."""
    if scheme.kind != "int":
        return f"gptq holds integers, not {scheme.kind}"
    if not scheme.symmetric:
        return "gptq holds symmetric integers: readers disagree about zero points, and vLLM has none"
    for name, size in (("rows", shape[0]), ("columns", shape[1])):
        if size * scheme.bits % WORD_BITS:
            return f"gptq packs {WORD_BITS // scheme.bits} {name} of {scheme.label} into a word, and {size} do not fill theirs"
    return None


def notes(schemes: Iterable[Scheme]) -> list[str]:
    """What a person should know about a release with these schemes."""
    if any(scheme.ordered for scheme in schemes):
        return ["vLLM refuses activation order (desc_act) since 0.32, GPTQModel reads it; the static order is read by both"]
    return []


def layout(module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str = "BF16") -> list[TensorSpec]:
    """The tensors that stand for one quantized weight; arguments as in `compressed_tensors.layout`."""
    rows, columns = shape
    groups = columns // (scheme.group or columns)
    return [
        TensorSpec(f"{module}.qweight", "I32", (columns * scheme.bits // WORD_BITS, rows)),
        TensorSpec(f"{module}.qzeros", "I32", (groups, rows * scheme.bits // WORD_BITS)),
        TensorSpec(f"{module}.scales", dtype, (groups, rows)),
        TensorSpec(f"{module}.g_idx", "I32", (columns,)),
    ]


def pack(module: str, quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of one quantized weight by name, as `layout` lists them."""
    scheme, codes = quantized.scheme, quantized.codes
    assert (wrong := complaint(scheme, tuple(codes.shape))) is None, wrong
    assert scheme.ordered or quantized.group_of_column is None, "a scheme without order was given one"
    rows, groups = quantized.scales.shape
    stored_zero = torch.full((groups, rows), -1, dtype=torch.int8)  # of signed codes: 2^(bits-1) is added to it, as to them
    return {
        f"{module}.qweight": pack_words(codes, scheme.bits).t().contiguous(),
        f"{module}.qzeros": pack_words(stored_zero, scheme.bits),
        f"{module}.scales": quantized.scales.t().contiguous(),
        f"{module}.g_idx": column_groups(quantized),
    }


def unpack(
    module: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, ...], config: Mapping[str, Any] | None = None
) -> Quantized:
    """The quantized weight that these tensors stand for.

    Args:
        tensors: at least those that `layout` lists, by name; `g_idx` may be missing where nothing is ordered.
        shape: (out, in).
        config: the quantization_config that came with them; None: as we write them.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype than the scheme asks for, or contradicts it.
    """
    expected = layout(module, shape, scheme)
    found = {spec.name.rpartition(".")[2]: _checked(spec, tensors, scheme) for spec in expected if spec.name in tensors}
    missing = [s.name for s in expected if s.name not in tensors and (scheme.ordered or not s.name.endswith("g_idx"))]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing; {scheme.label} needs it", MEND)
    codes = unpack_words(found["qweight"].t().contiguous(), scheme.bits, shape[1])
    stored = unpack_words(found["qzeros"].contiguous(), scheme.bits, shape[0])
    zeros = _zero_points(f"{module}.qzeros", stored, scheme, (config or {}).get("checkpoint_format", VERSION_1))
    order = order_of(f"{module}.g_idx", found.get("g_idx"), scheme, shape[1], stored.shape[0])
    return Quantized(scheme, codes, found["scales"].t().contiguous(), zeros, group_of_column=order)


def _checked(spec: TensorSpec, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    tensor = tensors[spec.name]
    if tuple(tensor.shape) != spec.shape:
        raise CheckpointError(f"{spec.name} has the shape {list(tensor.shape)}, {scheme.label} needs {list(spec.shape)}", MEND)
    known = (torch.bfloat16, torch.float16, torch.float32) if spec.name.endswith(".scales") else (TORCH_DTYPE[spec.dtype],)
    if tensor.dtype not in known:
        raise CheckpointError(f"{spec.name} is {tensor.dtype}, {scheme.label} needs {spec.dtype}", MEND)
    return tensor


def _zero_points(name: str, stored: Tensor, scheme: Scheme, version: str) -> Tensor | None:
    """int8 [out, groups], or None where the scheme has none; `stored` is int8 [groups, out], 2^(bits-1) taken off."""
    top = 2 ** (scheme.bits - 1) - 1
    less_one = version == VERSION_1
    if scheme.symmetric:
        if not bool((stored == (-1 if less_one else 0)).all()):
            raise CheckpointError(
                f"{name}: config.json says symmetric in format {version}, the zero points say otherwise", MEND
            )
        return None
    if less_one and bool((stored == top).any()):
        what = f"{name} holds {2**scheme.bits - 1}, which stands for a zero point of 0 to some readers of format {version} and for {2**scheme.bits} to others"
        raise CheckpointError(what, "get the checkpoint in format gptq_v2")
    return (stored + 1 if less_one else stored).t().contiguous()


def shape_of(module: str, scheme: Scheme, tensors: Mapping[str, TensorEntry], read: Callable[[str], Tensor]) -> tuple[int, int]:
    """(out, in) of a stored weight."""
    words, rows = tensors[f"{module}.qweight"].shape
    return rows, words * WORD_BITS // scheme.bits


def row_step(scheme: Scheme) -> int:
    """Rows that can only be read together: those of a word of zero points."""
    return WORD_BITS // scheme.bits


def part_of(suffix: str, scheme: Scheme, first: int, last: int) -> Part | None:
    """The part of a stored tensor that rows first..last of the weight need, both multiples of `row_step`; None: it is not needed."""
    if suffix == "g_idx":
        return ()
    step = row_step(scheme) if suffix == "qzeros" else 1
    return slice(None), slice(first // step, last // step)


def quantization_config(assigned: Mapping[str, Scheme], kept: Collection[str]) -> dict[str, Any]:
    """What `config.json` says about a release; arguments as in `quantization_config.quantization_config`."""
    by_scheme = by_stored_scheme(assigned)
    base = leading_scheme(by_scheme)
    return numbers(base) | {
        "checkpoint_format": VERSION_1,
        "dynamic": _dynamic(assigned, kept, by_scheme, base),
        "lm_head": "lm_head" in assigned,
        "pack_dtype": "int32",
        "quant_method": METHOD,
    }


def numbers(scheme: Scheme) -> dict[str, Any]:
    """A scheme in the words of GPTQModel."""
    return {"bits": scheme.bits, "desc_act": scheme.ordered, "group_size": scheme.group or -1, "sym": scheme.symmetric}


def _dynamic(
    assigned: Mapping[str, Scheme], kept: Collection[str], by_scheme: Mapping[Scheme, list[str]], base: Scheme
) -> dict[str, dict[str, Any]]:
    """Patterns of what is not as the base says: first what is not quantized."""
    components, rest = whole_components(assigned, kept)
    negative = [COMPONENTS[c] for c in components] + patterns(rest, assigned, containers=True, scopes=PREFIXES)
    if "mtp" not in components:
        negative = [line.replace("mtp", "m[t]p") for line in negative]
    rules: dict[str, dict[str, Any]] = {f"-:{line[3:]}": {} for line in negative}
    for scheme, modules in by_scheme.items():
        if scheme != base:
            others = [*kept, *(m for m in assigned if m not in set(modules))]
            lines = patterns(modules, others, containers=True, scopes=PREFIXES)
            rules |= {f"+:{line[3:]}": numbers(scheme) for line in lines}
    return rules


def sidecars(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Files besides config.json that say the same, by name."""
    return {"quantize_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def scheme_of(config: Mapping[str, Any], module: str) -> Scheme | None:
    """The scheme of a module according to a quantization_config, ours or anybody's; None where it is not quantized.

    As GPTQModel decides: the first pattern of `dynamic` that matches the name from its beginning.

    Raises:
        CheckpointError: a version, a packing or numbers that we cannot read.
    """
    version = config.get("checkpoint_format") or VERSION_1
    if version not in (VERSION_1, VERSION_2) or config.get("pack_dtype", "int32") != "int32":
        what = f"the checkpoint is GPTQ in format {version!r}, packed as {config.get('pack_dtype', 'int32')}"
        raise CheckpointError(what, f"Qwench reads {VERSION_1} and {VERSION_2}, packed as int32")
    overrides = _override(config.get("dynamic") or {}, module)
    return None if overrides is None else read_numbers({**config, **overrides}, module)


def _override(dynamic: Mapping[str, Mapping[str, Any]], module: str) -> Mapping[str, Any] | None:
    for pattern, values in dynamic.items():
        try:
            if re.match(re.sub(r"^[+-]:", "", pattern), module):
                return None if pattern.startswith("-:") else values
        except re.error as error:
            raise CheckpointError(f"config.json: dynamic: {pattern!r} is no pattern: {error}", MEND) from None
    return {}


def read_numbers(values: Mapping[str, Any], module: str) -> Scheme:
    """A scheme from bits, group_size, sym and desc_act. Raises CheckpointError."""
    bits, group = values.get("bits"), values.get("group_size", 128)
    if bits not in (4, 8) or not isinstance(group, int) or (group < 1 and group != -1):
        raise CheckpointError(
            f"{module} is stored with {bits} bits in groups of {group}", "Qwench reads 4 and 8 bits, in groups or by row (-1)"
        )
    ordered = bool(values.get("desc_act", False)) and group != -1
    return Scheme("int", bits, None if group == -1 else group, symmetric=bool(values.get("sym", True)), ordered=ordered)
