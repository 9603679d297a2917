"""The compressed-tensors container: which tensors stand for one quantized weight, byte by byte. See docs/formats.md.

| scheme | format                 | tensors of one module (out, in)                                                                |
|--------|------------------------|------------------------------------------------------------------------------------------------|
| int    | `pack-quantized`       | weight_packed I32 [out, ceil(in*bits/32)], weight_scale [out, groups], weight_shape I64 [2];   |
|        |                        | asymmetric: weight_zero_point I32 [ceil(out*bits/32), groups];                                 |
|        |                        | ordered: weight_g_idx I32 [in], the group of each column                                       |
| nvfp4  | `nvfp4-pack-quantized` | weight_packed U8 [out, in/2], weight_scale F8_E4M3 [out, in/16], weight_global_scale F32 [1]   |
| mxfp4  | `mxfp4-pack-quantized` | weight_packed U8 [out, in/2], weight_scale U8 [out, in/32]                                     |
|        |                        | activations in nvfp4: input_global_scale F32 [1], a divisor like the other one                 |
| fp8    | `float-quantized`      | weight F8_E4M3 [out, in], weight_scale [out, 1] or [ceil(out/128), ceil(in/128)]               |

Of others, read and not written:

| scheme                            | format            | tensors                                                                 |
|-----------------------------------|-------------------|-------------------------------------------------------------------------|
| fp8, one scale                    | `float-quantized` | weight F8_E4M3 [out, in], weight_scale [1]                               |
| fp8 by row or with one scale, inputs over a stored scale | `float-quantized` | as above, and input_scale [1], a factor           |
| fp8 in blocks of any size         | `float-quantized` | weight_scale [ceil(out/height), ceil(in/width)]                         |
| int8 by row or with one scale, inputs in int8 | `int-quantized` | weight I8 [out, in], weight_scale [out, 1] or [1]               |

`layout` knows all of it from the shape alone, so that a plan can count bytes and a writer can write headers before any number is there;
`pack` returns exactly what `layout` promised; `unpack` is its inverse. What `config.json` says about them is in `quantization_config`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.source import TORCH_DTYPE, Part, TensorEntry, TensorSpec
from qwench.errors import CheckpointError
from qwench.formats.bits import WORD_BITS, pack_nibbles, pack_rows, pack_words, unpack_nibbles, unpack_rows, unpack_words
from qwench.formats.order import MEND, column_groups, order_of
from qwench.formats.quantization_config import FORMAT_OF, METHOD, quantization_config, scheme_of
from qwench.numerics import Quantized, Scheme

__all__ = ["CODES", "FORMAT_OF", "METHOD", "SCALES", "SUFFIXES", "complaint", "fits", "layout", "notes", "pack", "part_of"]
__all__ += ["quantization_config", "row_step", "scheme_of", "shape_of", "sidecars", "unpack"]

CODES = ("weight_packed", "weight")
SCALES = "weight_scale"
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale", "weight_g_idx")
"""Names of tensors that only a quantized module has."""
INPUT_SCALE = "input_global_scale"
"""Name of the divisor of NVFP4 activations."""
STORED_SCALE = "input_scale"
"""Name of the one scale of FP8 activations."""
INPUT_SCALES = {"nvfp4": INPUT_SCALE, "fp8-tensor": STORED_SCALE}
"""By what is done to inputs: the one number that is stored for it."""
FREE = (torch.bfloat16, torch.float16, torch.float32)
"""What scales of integers and of FP8 are stored in."""

FOUR_BIT_NOTE = (
    "4-bit activations are computed by GPUs with FP4 tensor cores (NVIDIA Blackwell: compute capability 10.0, 12.0); elsewhere vLLM leaves them in 16 bits, and the "
    "release is as fast and as accurate as its weights alone"
)
EIGHT_BIT_NOTE = "8-bit activations are computed by GPUs with FP8 tensor cores (NVIDIA: compute capability 8.9 and up); elsewhere vLLM leaves them in 16 bits"


def complaint(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """Why this container cannot hold a weight of this shape (out, in) in this scheme, or None."""
    if scheme.ordered:
        return "compressed-tensors lost the order of columns in 2026: its library, vLLM and transformers refuse it"
    return None


def notes(schemes: Iterable[Scheme]) -> list[str]:
    """What a person should know about a release with these schemes."""
    asked = {scheme.activations for scheme in schemes}
    return [FOUR_BIT_NOTE] * ("nvfp4" in asked) + [EIGHT_BIT_NOTE] * ("fp8" in asked)


def sidecars(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Files besides config.json: none."""
    return {}


def layout(module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str = "BF16") -> list[TensorSpec]:
    """The tensors that stand for one quantized weight.

    Args:
        module: its module path, without `.weight`.
        shape: (out, in).
        scheme: a scheme that has no complaint about this shape.
        dtype: safetensors code that `int` and `fp8` scales are stored in.
    """
    rows, columns = shape
    if scheme.kind == "fp8" or is_plain(scheme):
        codes = "F8_E4M3" if scheme.kind == "fp8" else "I8"
        height, width = scheme.block or (1, columns)
        scales = (1,) if scheme.tensor else (math.ceil(rows / height), math.ceil(columns / width))
        specs: dict[str, tuple[str, tuple[int, ...]]] = {"weight": (codes, (rows, columns)), "weight_scale": (dtype, scales)}
        if scheme.activations == "fp8-tensor":
            specs[STORED_SCALE] = (dtype, (1,))
    elif scheme.kind == "int":
        groups = columns // (scheme.group or columns)
        specs = {
            "weight_packed": ("I32", (rows, math.ceil(columns * scheme.bits / 32))),
            "weight_scale": (dtype, (rows, groups)),
            "weight_shape": ("I64", (2,)),
        }
        if not scheme.symmetric:
            specs["weight_zero_point"] = ("I32", (math.ceil(rows * scheme.bits / 32), groups))
        if scheme.ordered:
            specs["weight_g_idx"] = ("I32", (columns,))
    else:
        assert scheme.group is not None
        specs = {
            "weight_packed": ("U8", (rows, columns // 2)),
            "weight_scale": ("F8_E4M3" if scheme.kind == "nvfp4" else "U8", (rows, columns // scheme.group)),
        }
        if scheme.kind == "nvfp4":
            specs["weight_global_scale"] = ("F32", (1,))
        if scheme.activations == "nvfp4":
            specs[INPUT_SCALE] = ("F32", (1,))
    return [TensorSpec(f"{module}.{suffix}", code, dims) for suffix, (code, dims) in specs.items()]


def pack(module: str, quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of one quantized weight by name, as `layout` lists them."""
    scheme, codes = quantized.scheme, quantized.codes
    assert scheme.ordered or quantized.group_of_column is None, "a scheme without order was given one"
    tensors: dict[str, Tensor] = {}
    if scheme.kind == "fp8" or is_plain(scheme):
        tensors["weight"] = codes
    elif scheme.kind == "int":
        tensors["weight_packed"] = pack_words(codes, scheme.bits)
        tensors["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
        if quantized.zeros is not None:
            tensors["weight_zero_point"] = pack_rows(quantized.zeros, scheme.bits)
        if scheme.ordered:
            tensors["weight_g_idx"] = column_groups(quantized)
    else:
        tensors["weight_packed"] = pack_nibbles(codes)
        if quantized.outer is not None:
            tensors["weight_global_scale"] = quantized.outer
    if scheme.activations in INPUT_SCALES:
        assert quantized.input_outer is not None, f"{module}: nothing has found the range of its inputs"
        tensors[INPUT_SCALES[scheme.activations]] = quantized.input_outer
    tensors["weight_scale"] = quantized.scales
    return {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}


def unpack(
    module: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, ...], config: Mapping[str, Any] | None = None
) -> Quantized:
    """The quantized weight that these tensors stand for.

    Args:
        tensors: at least those that `layout` lists, by name; `weight_shape` may be missing.
        shape: (out, in).
        config: not needed; other containers do.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype than the scheme asks for.
    """
    found = {spec.name.removeprefix(f"{module}."): _checked(spec, tensors, scheme) for spec in layout(module, shape, scheme)}
    scales, outer = found["weight_scale"], found.get("weight_global_scale")
    assert scales is not None
    if scheme.kind == "fp8" or is_plain(scheme):
        return Quantized(scheme, _there(found, "weight"), scales, input_outer=found.get(STORED_SCALE))
    packed = _there(found, "weight_packed")
    if scheme.kind != "int":
        return Quantized(scheme, unpack_nibbles(packed), scales, outer=outer, input_outer=found.get(INPUT_SCALE))
    zeros = None if scheme.symmetric else unpack_rows(_there(found, "weight_zero_point"), scheme.bits, shape[0])
    order = order_of(f"{module}.weight_g_idx", found.get("weight_g_idx"), scheme, shape[1], scales.shape[1])
    return Quantized(scheme, unpack_words(packed, scheme.bits, shape[1]), scales, zeros, group_of_column=order)


def _there(found: Mapping[str, Tensor | None], suffix: str) -> Tensor:
    tensor = found[suffix]
    assert tensor is not None
    return tensor


def _checked(spec: TensorSpec, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor | None:
    """The tensor of a spec. Raises CheckpointError where it is not what the scheme asks for."""
    tensor = tensors.get(spec.name)
    if spec.name.endswith("weight_shape"):
        return tensor
    if tensor is None:
        raise CheckpointError(f"{spec.name} is missing; {scheme.label} needs it", MEND)
    if not fits(tuple(tensor.shape), spec):
        raise CheckpointError(f"{spec.name} has the shape {list(tensor.shape)}, {scheme.label} needs {list(spec.shape)}", MEND)
    free = spec.name.endswith(("weight_scale", STORED_SCALE)) and scheme.kind in ("int", "fp8")
    if not (free and tensor.dtype in FREE) and tensor.dtype != TORCH_DTYPE[spec.dtype]:
        raise CheckpointError(f"{spec.name} is {tensor.dtype}, {scheme.label} needs {spec.dtype}", MEND)
    return tensor


def is_plain(scheme: Scheme) -> bool:
    """Whether codes are integers one to a byte."""
    return scheme.kind == "int" and scheme.activations == "int8"


def fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    """Whether a stored tensor has the shape of a spec; one number may come with or without a dimension."""
    return shape == spec.shape or (spec.shape == (1,) and shape == ())


def shape_of(module: str, scheme: Scheme, tensors: Mapping[str, TensorEntry], read: Callable[[str], Tensor]) -> tuple[int, int]:
    """(out, in) of a stored weight. Only rows of integers without groups need the stored shape: their last word may be partly filled."""
    codes = next(tensors[f"{module}.{suffix}"] for suffix in CODES if f"{module}.{suffix}" in tensors).shape
    if scheme.kind == "fp8" or is_plain(scheme):
        return codes[0], codes[1]
    if scheme.group:
        return codes[0], tensors[f"{module}.weight_scale"].shape[1] * scheme.group
    name = f"{module}.weight_shape"
    return codes[0], int(read(name)[1]) if name in tensors else codes[1] * WORD_BITS // scheme.bits


def row_step(scheme: Scheme) -> int:
    """Rows that can only be read together: those of a block, or of a word of zero points."""
    if scheme.block:
        return scheme.block[0]
    return 1 if scheme.symmetric else WORD_BITS // scheme.bits


def part_of(suffix: str, scheme: Scheme, first: int, last: int) -> Part | None:
    """The part of a stored tensor that rows first..last of the weight need; None: it is not needed.

    `first` is a multiple of `row_step`, `last` too unless it is the end.
    """
    if suffix == "weight_shape":
        return None
    if suffix in ("weight_global_scale", "weight_g_idx", *INPUT_SCALES.values()) or (
        suffix == "weight_scale" and scheme.tensor
    ):
        return ()
    # Scales of blocks and words of zero points have fewer rows than the weight.
    fewer = suffix == "weight_zero_point" or (suffix == "weight_scale" and scheme.block)
    step = row_step(scheme) if fewer else 1
    return (slice(first // step, math.ceil(last / step)),)
