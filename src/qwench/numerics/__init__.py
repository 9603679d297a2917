"""Number formats: how a matrix of weights becomes codes and scales, and back. No files, no names, no models.

    quantized = encode(weight, SCHEMES["nvfp4"], outer=outer_scale(amax_of_the_fused_set))
    values = decode(quantized)              # float32, exactly what the codes stand for

For every scheme `decode(encode(x))` is, number by number, the nearest value that the chosen scale can represent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.numerics.activation import InputRounding
from qwench.numerics.chunks import finite, largest_magnitude
from qwench.numerics.float4 import decode_float4, encode_mxfp4, encode_nvfp4, outer_scale
from qwench.numerics.float8 import decode_fp8, encode_fp8
from qwench.numerics.integer import decode_integer, encode_integer
from qwench.numerics.quantized import Quantized, RoundTrip
from qwench.numerics.scheme import SCHEMES, Activations, Kind, Scheme, Search

__all__ = [
    "SCHEMES",
    "Activations",
    "InputRounding",
    "Kind",
    "Quantized",
    "RoundTrip",
    "Scheme",
    "Search",
    "complaint",
    "decode",
    "encode",
    "finite",
    "largest_magnitude",
    "outer_scale",
]

FIXED_GROUPS = {"nvfp4": 16, "mxfp4": 32}
FIXED_BITS = {"nvfp4": 4, "mxfp4": 4, "fp8": 8}


def encode(weight: Tensor, scheme: Scheme, outer: Tensor | None = None, scale_dtype: torch.dtype = torch.bfloat16) -> Quantized:
    """Rounds a matrix to the nearest codes of a scheme.

    Args:
        weight: [out, in], any floating dtype, on any device, all values finite (the caller checks: see `finite`); need not be contiguous.
        scheme: one that `complaint` has nothing against for this shape.
        outer: float32 [1], `nvfp4` only: the divisor of the fused set, see `outer_scale`. None: of this matrix alone.
        scale_dtype: what `int` and `fp8` scales are stored in.

    Returns:
        Codes, scales and the round-trip error, in main memory. Runs on `torch.get_num_threads()` threads; the result does not depend on how many.
    """
    assert (wrong := complaint(scheme, tuple(weight.shape))) is None, wrong
    weight = weight.cpu()
    if scheme.kind == "int":
        return encode_integer(weight, scheme, scale_dtype)
    if scheme.kind == "nvfp4":
        return encode_nvfp4(weight, scheme, outer)
    if scheme.kind == "mxfp4":
        return encode_mxfp4(weight, scheme)
    return encode_fp8(weight, scheme, scale_dtype)


def decode(quantized: Quantized) -> Tensor:
    """The values that a quantized matrix stands for, float32 [out, in]."""
    if quantized.scheme.kind == "int":
        return decode_integer(quantized)
    if quantized.scheme.kind in ("nvfp4", "mxfp4"):
        return decode_float4(quantized)
    return decode_fp8(quantized)


def complaint(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """Why a weight of this shape cannot be stored in this scheme, or None. From shapes alone.

    A group must divide a row: no container that we write holds partial groups. FP8 blocks may be partial at the edges, and rows of integer
    codes need not fill their last word.
    """
    if len(shape) != 2 or 0 in shape:
        return f"{scheme.label} needs a matrix, the shape is {list(shape)}"
    wrong = _scheme_complaint(scheme)
    if wrong:
        return wrong
    if scheme.group and shape[1] % scheme.group:
        return f"{scheme.label}: a group of {scheme.group} does not divide rows of {shape[1]}"
    return None


def _scheme_complaint(scheme: Scheme) -> str | None:
    """What no weight could mend: a scheme that contradicts its own kind."""
    kind = scheme.kind
    if scheme.tensor or scheme.activations in ("fp8-tensor", "fp8-group", "int8"):
        return f"{scheme.label} is read from releases of others, not written"
    if kind == "int" and scheme.bits not in (4, 8):
        return f"int{scheme.bits} is not offered: 4 or 8 bits"
    if kind in FIXED_BITS and scheme.bits != FIXED_BITS[kind]:
        return f"{kind} has {FIXED_BITS[kind]} bits, not {scheme.bits}"
    if kind in FIXED_GROUPS and scheme.group != FIXED_GROUPS[kind]:
        return f"{kind} has groups of {FIXED_GROUPS[kind]}, not {scheme.group}"
    if kind == "fp8" and scheme.group is not None:
        return "fp8 has a scale for a row or for a block, not for a group"
    if scheme.block is not None and (kind != "fp8" or scheme.block != (128, 128)):
        return f"a block of {scheme.block} is not offered: only fp8 has blocks, of 128x128"
    if scheme.group is not None and scheme.group < 1:
        return f"a group of {scheme.group} columns cannot be"
    if not scheme.symmetric and (kind != "int" or scheme.full_range):
        return "only int can be asymmetric, and full_range says that it is symmetric"
    if scheme.full_range and kind != "int":
        return f"full_range is for int, not for {kind}"
    if scheme.activations != "none" and scheme.activations != kind:
        return (
            f"{kind} weights do not go with {scheme.activations} activations in any engine: nvfp4 goes with nvfp4, fp8 with fp8"
        )
    if scheme.activations == "fp8" and scheme.block is not None:
        return "fp8 activations have a scale for each token, which goes with weights of a scale per row, not per block"
    if scheme.ordered and (kind != "int" or scheme.group is None):
        return "columns can be ordered only in int with groups: elsewhere no group has to be told of a column"
    if scheme.search == "mse" and kind == "fp8":
        return "fp8 has no mse search: its steps grow with the values, a smaller range does not make them finer"
    if scheme.search == "four-over-six" and kind != "nvfp4":
        return f"the four-over-six search is for nvfp4, not for {kind}"
    return None
