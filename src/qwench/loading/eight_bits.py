"""Eight-bit schemes of compressed-tensors: what vLLM and SGLang build in them, beyond what names and shapes say.

| scheme | linear layers | experts |
|---|---|---|
| FP8, inputs as they are | vLLM reads; SGLang not in blocks | neither |
| FP8 by row, a scale for each token | both | both |
| FP8 with one scale, inputs over a stored one | both | both |
| FP8 with one scale and a scale for each token, or by row over a stored one | both | neither |
| FP8 in blocks, a scale for each group of a token | both, where blocks divide all that is joined but the last | both, where blocks divide gate and up |
| INT8 by row, a scale for each token | both | vLLM |
| INT8 with one scale | both | neither |

Sources: vLLM 0.32 `layers/quantization/compressed_tensors` (`compressed_tensors.py`, `_get_scheme_from_parts`; `compressed_tensors_moe`, `get_moe_method` and the classes for FP8 and INT8;
`utils/fp8_utils.py`, `validate_fp8_block_shape`), and the files of the same names in SGLang 0.5.19 to 0.5.23, which read alike in this.
"""

from __future__ import annotations

from qwench.loading.parts import Module, Stop
from qwench.numerics import Scheme

TOGETHER = ((False, "fp8"), (True, "fp8-tensor"))
"""Whether a weight has one scale, and its inputs: what experts in FP8 without blocks can have."""
DELTA = "in_proj_qkvz"


def checked(scheme: Scheme | None, module: Module) -> Scheme | None:
    """A scheme that the engine builds this module in. Raises Stop where it has no method for it, or its blocks do not fit."""
    if scheme is None:
        return None
    if scheme.block:
        _blocks_fit(scheme.block[0], module)
    if module.kind == "experts" and scheme.bits == 8:
        _experts_have_a_method(scheme)
    return scheme


def _experts_have_a_method(scheme: Scheme) -> None:
    if scheme.kind == "fp8" and scheme.activations == "none":
        raise Stop("weight-only FP8 experts: there is no such method", "ct-experts-methods")
    if scheme.kind == "fp8" and not scheme.block and (scheme.tensor, scheme.activations) not in TOGETHER:
        why = f"experts in {scheme.label}: a scale for each row goes with one for each token, one scale with a stored one"
        raise Stop(why, "ct-experts-methods")
    if scheme.kind == "int" and scheme.activations == "int8" and scheme.tensor:
        raise Stop(f"experts in {scheme.label}: they need a scale for each row", "ct-experts-methods")


def _blocks_fit(rows: int, module: Module) -> None:
    """What is joined begins with a block; gate and up of experts end with one, too."""
    if module.kind == "experts":
        width = module.members[0].shape[0]
        if width % rows:
            raise Stop(f"experts of width {width} cannot be cut into blocks of {rows} rows", "ct-fp8-blocks")
        return
    for part in pieces(module)[:-1]:
        if part % rows:
            raise Stop(f"{part} rows of what is joined, which blocks of {rows} do not divide", "ct-fp8-blocks")


def pieces(module: Module) -> list[int]:
    """Rows of what a joined module is cut into: its members, and of a projection of Gated DeltaNet its keys twice, then its values twice."""
    rows = [member.shape[0] for member in module.members]
    if module.leaf != DELTA or len(rows) != 2:
        return rows
    both, values = rows  # queries, keys and values; the gate, which is as wide as the values
    return [(both - values) // 2, (both - values) // 2, values, values]
