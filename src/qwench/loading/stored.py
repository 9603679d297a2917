"""The tensors that stand for one quantized weight in formats of other writers: block FP8, FP8 with one scale, AWQ, ModelOpt.

An engine that has decided to build a module in one of them allocates parameters of these names and shapes, and expects the file to hold a tensor for each. Our own containers say the same of
themselves (`formats.Container.layout`); of these nothing is decoded here, only laid out. `M` is the stored module, a weight is [out, in]:

| format | tensors |
|---|---|
| FP8 in blocks (DeepSeek's, Qwen's `-FP8`) | `M.weight` F8_E4M3 [out, in], `M.weight_scale_inv` [ceil(out / 128), ceil(in / 128)]: value = code * scale, whatever the name says |
| FP8 with one scale | `M.weight`, `M.weight_scale` [], with stored input scales `M.input_scale` [] |
| ModelOpt FP8 by row, in blocks | `M.weight_scale` [out]; [ceil(out / 128), 1, in / 128, 1] |
| AWQ ("GEMM") | `M.qweight` I32 [in, out / 8], `M.qzeros` I32 [in / group, out / 8], `M.scales` [in / group, out]; the eight codes of a word in the order 0 2 4 6 1 3 5 7 |
| ModelOpt NVFP4 | `M.weight` U8 [out, in / 2], `M.weight_scale` F8_E4M3 [out, in / 16], `M.weight_scale_2` []: a factor, where compressed-tensors stores its inverse; with 4-bit inputs `M.input_scale` [] |
| ModelOpt MXFP8 | `M.weight` F8_E4M3, `M.weight_scale` U8 [out, in / 32] |

Sources: vLLM 0.32 `layers/quantization/{fp8,auto_awq,modelopt}.py` (`create_weights`), SGLang 0.5.23 `layers/quantization/{fp8,awq,modelopt_quant}.py`, transformers 5.23 `integrations/finegrained_fp8.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Shape = tuple[int, ...] | None

KINDS = {
    **dict.fromkeys(("F64", "F32", "F16", "BF16"), "float"),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2"), "fp8"),
    **dict.fromkeys(("U8", "I8"), "bytes"),
}
"""Kinds of numbers that a copy from one into another changes, by safetensors dtype; of other dtypes nothing is said."""


@dataclass(frozen=True)
class Expected:
    """A tensor that is expected for a member.

    Attributes:
        shape: its dimensions; None: any.
        holds: its kind of numbers, see `KINDS`.
        needed: whether it matters where it is not stored.
    """

    shape: Shape
    holds: str = "float"
    needed: bool = True


@dataclass(frozen=True)
class Span:
    """The rows of a joined module: those of the members before this one, and all of them."""

    before: int
    all: int


Lay = Callable[[tuple[int, int], Span], dict[str, Expected]]
"""The tensors of a member by last name, from its (out, in) and its place in the module."""


@dataclass(frozen=True)
class Stored:
    """A format of another writer.

    Attributes:
        label: its name in findings.
        lay: see `Lay`.
    """

    label: str
    lay: Lay = field(compare=False)


def block_fp8(block: tuple[int, int], strict_rows: bool = True) -> Stored:
    """FP8 in blocks.

    Args:
        strict_rows: the scales of a joined module are one tensor with ceil(all rows / block) rows, into which members are copied from row ceil(rows before / block) on. Members whose rows are no
            multiple of the block do not fit then.
    """
    down, across = block

    def lay(shape: tuple[int, int], span: Span) -> dict[str, Expected]:
        rows = _blocks(shape[0], down)
        if strict_rows:
            rows = min(rows, _blocks(span.all, down) - _blocks(span.before, down))
        return {"weight": Expected(shape, "fp8"), "weight_scale_inv": Expected((rows, _blocks(shape[1], across)))}

    return Stored(f"fp8 {down}x{across}", lay)


def tensor_fp8(scale: str, inputs: str = "") -> Stored:
    """FP8 with one scale for a weight. `scale`, `inputs`: last names of the scales of the weight and, where they are stored, of its inputs."""

    def lay(shape: tuple[int, int], span: Span) -> dict[str, Expected]:
        return {"weight": Expected(shape, "fp8"), scale: Expected(())} | ({inputs: Expected(())} if inputs else {})

    return Stored("fp8 tensor", lay)


def row_fp8() -> Stored:
    """ModelOpt's FP8 with a scale for each row (FP8_PER_CHANNEL_PER_TOKEN)."""
    return Stored(
        "fp8 channel",
        lambda shape, span: {"weight": Expected(shape, "fp8"), "weight_scale": Expected((shape[0],))},
    )


def modelopt_block_fp8() -> Stored:
    """ModelOpt's FP8 in blocks of 128 (FP8_PB_WO): a scale of four dimensions, under a name of its own."""

    def lay(shape: tuple[int, int], span: Span) -> dict[str, Expected]:
        return {
            "weight": Expected(shape, "fp8"),
            "weight_scale": Expected((_blocks(shape[0], 128), 1, _blocks(shape[1], 128), 1)),
        }

    return Stored("fp8 128x128", lay)


def awq(bits: int, group: int) -> Stored:
    """AWQ's layout. `group`: -1 for a whole column."""

    def lay(shape: tuple[int, int], span: Span) -> dict[str, Expected]:
        (out, inner), words = shape, 32 // bits
        groups = 1 if group == -1 else inner // group
        return {
            "qweight": Expected((inner, out // words), "words"),
            "qzeros": Expected((groups, out // words), "words"),
            "scales": Expected((groups, out)),
        }

    return Stored(f"awq int{bits} g{group}", lay)


def nvfp4(group: int, inputs: str, smoothed: bool = False) -> Stored:
    """ModelOpt's NVFP4.

    Args:
        inputs: `stored`: inputs are rounded over a stored scale; `dropped`: such a scale is taken and not used.
        smoothed: with a factor for each input channel (NVFP4_AWQ).
    """

    def lay(shape: tuple[int, int], span: Span) -> dict[str, Expected]:
        out, inner = shape
        tensors = {
            "weight": Expected((out, inner // 2), "bytes"),
            "weight_scale": Expected((out, inner // group), "fp8"),
            "weight_scale_2": Expected(()),
            "input_scale": Expected((), needed=inputs == "stored"),
        }
        return tensors | ({"pre_quant_scale": Expected((inner,))} if smoothed else {})

    return Stored(f"modelopt nvfp4 g{group}{' w4a4' if inputs == 'stored' else ''}", lay)


def mxfp8() -> Stored:
    """ModelOpt's MXFP8: an exponent for each 32 columns."""

    def lay(shape: tuple[int, int], span: Span) -> dict[str, Expected]:
        return {"weight": Expected(shape, "fp8"), "weight_scale": Expected((shape[0], shape[1] // 32), "bytes")}

    return Stored("mxfp8 g32", lay)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)
