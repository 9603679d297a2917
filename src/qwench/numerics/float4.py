"""Four-bit floats, E2M1, in blocks: NVFP4 and MXFP4.

E2M1 has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6: one sign bit, two exponent bits, one mantissa bit. A code is sign<<3 | index into that list.

- NVFP4 (NVIDIA, 2025): a block of 16 shares an FP8 E4M3 scale, and a matrix (here: a fused set of matrices) one float32 divisor, `outer` =
  448 * 6 / amax, which makes the largest block scale 448, the largest E4M3 number. value = E2M1(code) * (scale / outer).
- MXFP4 (OCP Microscaling Formats v1.0): a block of 32 shares a power of two, stored as E8M0, an exponent with bias 127. value = E2M1(code) * 2^e.

Rounding is to nearest, ties to the even code, of the float32 quotient |weight| / (scale / outer), as the compressed-tensors library rounds.
The fast way to it: add to the quotient y, whose exponent is e (at least 0: below 1 the step stays 0.5), the number 2^(e+22). The sum has a
step of 2^(e-1), exactly that of E2M1, so the adder does the rounding, and the low bits of the sum are the number of steps. The code is that
plus twice e. No table, no comparison, six passes.

What it trades away: nothing in accuracy; NVFP4 block scales are kept at or above 2^-6, the smallest normal E4M3 number, because the Marlin
kernels of vLLM read smaller ones as zero. That concerns blocks whose values are all below 1/28,672 of the largest in the fused set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.numerics.chunks import INT_OF, ErrorSums, Tile, Workspace, error_sums, largest_magnitude, round_trip, work_through
from qwench.numerics.quantized import Quantized
from qwench.numerics.scheme import Scheme, Search

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by index."""

LARGEST = 6.0
E4M3_LARGEST = 448.0
E4M3_SMALLEST_NORMAL = 2.0**-6
OUTER_RANGE = (2.0**-116, 2.0**117)
"""Outer scales are kept within: beyond, scale / outer would leave the normal numbers of float32 (amax above 2.2e38 or below 1.6e-32)."""
MX_EXPONENT_RANGE = (1, 252)
"""E8M0 codes are kept within: 2^-126 is the smallest normal float32, and 6 * 2^125 the largest product that float32 holds."""

NVFP4_FACTORS = (1.0, 0.94, 0.88, 0.82, 0.76, 1.06, 1.12, 1.25, 1.5)
"""Factors on amax / 6 that the `mse` search tries for NVFP4 (steps of E4M3 are about 6 to 12 per cent); above 1, fewer codes are used."""
FOUR_OVER_SIX = (1.0, 1.5)
"""Map a block's largest value to 6, or to 4 (Cook et al. 2025, "Four Over Six")."""
MX_SHIFTS = (0, -1, 1)
"""Steps on the exponent that the `mse` search tries for MXFP4."""

EXPONENT = torch.tensor(0x7F800000, dtype=torch.int32)
ONE = 0x3F800000
TOP_BITS = torch.tensor(22, dtype=torch.int32)
SIGN_SHIFT = {size: torch.tensor(8 * size - 1, dtype=dtype) for size, dtype in INT_OF.items()}
STEPS = torch.tensor((22 << 23) + 214, dtype=torch.int32)
"""Constants of the inner passes are tensors of the right dtype: a Python number would be converted anew on every call. `STEPS` is added to the bits of 2^e: multiplies by 2^22, and adds 214 steps so that the low byte of the result, 214 + steps + 2 * (e + 149), is the
code itself modulo 256 (214 is even: ties still go to the even code)."""


def outer_scale(amax: Tensor | float) -> Tensor:
    """The NVFP4 divisor of a fused set whose largest magnitude is `amax`: float32 [1], 448 * 6 / amax.

    Kept within `OUTER_RANGE`; 1 where amax is 0.
    """
    amax = torch.as_tensor(amax, dtype=torch.float32).reshape(1)
    # Two tensors: a Python number would be multiplied by the reciprocal, which rounds twice.
    outer = torch.div(torch.tensor([E4M3_LARGEST * LARGEST]), amax).clamp(*OUTER_RANGE)
    return torch.where(amax > 0, outer, torch.ones_like(outer))


def encode_nvfp4(weight: Tensor, scheme: Scheme, outer: Tensor | None = None) -> Quantized:
    """Rounds a matrix to NVFP4.

    Args:
        weight: [out, in] of any floating type, in a multiple of 16.
        scheme: kind `nvfp4`; its search is `none`, `mse` or `four-over-six`.
        outer: float32 [1], the divisor of the fused set; None takes it from this matrix alone.
    """
    group = scheme.group or 16
    if outer is None:
        outer = outer_scale(largest_magnitude(weight))
    divisor = float(outer)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(weight.shape[0], weight.shape[1] // group, dtype=torch.float8_e4m3fn)

    def work(tile: Tile, space: Workspace) -> ErrorSums:
        blocks = magnitude(tile.of(weight), space).view(-1, group)
        scale = _best(blocks, fits_nvfp4(block_largest(blocks), divisor, scheme.search), space)
        scales[tile.rows].view(-1).copy_(scale)
        return _finish(tile, weight, blocks, scale / divisor, codes, space)

    return Quantized(scheme, codes, scales, outer=outer, error=round_trip(work_through(weight, work), weight.numel()))


def encode_mxfp4(weight: Tensor, scheme: Scheme) -> Quantized:
    """Rounds a matrix [out, in] to MXFP4; in is a multiple of 32.

    The exponent is that of amax less 2, one more where amax would round beyond 7/8 of the next power of two (the rule of the
    compressed-tensors library, which is that of the vLLM reference); amax then lies in [3.5, 7) steps of 1, and is clamped to 6.
    """
    group = scheme.group or 32
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    exponents = torch.empty(weight.shape[0], weight.shape[1] // group, dtype=torch.uint8)

    def work(tile: Tile, space: Workspace) -> ErrorSums:
        blocks = magnitude(tile.of(weight), space).view(-1, group)
        exponent = _best(blocks, fits_mxfp4(block_largest(blocks), scheme.search), space)
        exponents[tile.rows].view(-1).copy_(exponent)
        return _finish(tile, weight, blocks, power_of_two(exponent), codes, space)

    return Quantized(scheme, codes, exponents, error=round_trip(work_through(weight, work), weight.numel()))


def decode_float4(quantized: Quantized) -> Tensor:
    """The values of an NVFP4 or MXFP4 matrix, float32 [out, in]."""
    codes, group = quantized.codes, quantized.codes.shape[1] // max(1, quantized.scales.shape[1])
    values = torch.empty(codes.shape, dtype=torch.float32)
    if quantized.scheme.kind == "nvfp4":
        assert quantized.outer is not None
        scale = quantized.scales.to(torch.float32) / quantized.outer
    else:
        scale = power_of_two(quantized.scales)

    def work(tile: Tile, space: Workspace) -> None:
        signed = tile.of(values)
        _values(tile.of(codes), signed, space)
        blocks = signed.view(-1, group)
        torch.mul(blocks, scale[tile.rows].view(-1, 1), out=blocks)

    work_through(codes, work)
    return values


def fits_nvfp4(amax: Tensor, divisor: float, search: Search) -> list[tuple[Tensor, Tensor]]:
    """The scales that a search tries for blocks of largest magnitude `amax` (float32): pairs of what is stored, in float32, and scale / outer."""
    wanted = (amax / LARGEST).mul_(divisor)
    factors = {"none": (1.0,), "mse": NVFP4_FACTORS, "four-over-six": FOUR_OVER_SIX}[search]
    return [(stored, stored / divisor) for stored in (round_e4m3(wanted * factor) for factor in factors)]


def fits_mxfp4(amax: Tensor, search: Search) -> list[tuple[Tensor, Tensor]]:
    """The exponents that a search tries for blocks of largest magnitude `amax` (float32): pairs of the E8M0 code, int32, and 2^e."""
    power = amax.view(torch.int32).add(1 << 21).bitwise_right_shift_(23).sub_(2)
    candidates = [(power + shift).clamp_(*MX_EXPONENT_RANGE) for shift in (MX_SHIFTS if search == "mse" else (0,))]
    return [(stored, power_of_two(stored)) for stored in candidates]


def power_of_two(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) in float32, of E8M0 codes 0..254 (255 is NaN)."""
    biased = exponent.to(torch.int32)
    value = (biased.clamp(1, 254) << 23).view(torch.float32)
    value = torch.where(biased == 0, value * 0.5, value)
    return torch.where(biased == 255, torch.full_like(value, torch.nan), value)


def round_e4m3(scale: Tensor) -> Tensor:
    """Positive float32 to the nearest number of E4M3 in [2^-6, 448], in float32; ties to even. Overwrites its input.

    By the same trick as for E2M1: 2^(e+20) + scale has the step of E4M3 at exponent e.
    """
    scale.clamp_(E4M3_SMALLEST_NORMAL, E4M3_LARGEST)
    large = scale.view(torch.int32).bitwise_and(EXPONENT).add_(20 << 23).view(torch.float32)
    return scale.add_(large).sub_(large)


def magnitude(weight: Tensor, space: Workspace) -> Tensor:
    """|weight| in float32, contiguous. The sign is taken off while the numbers are still short."""
    shape = (weight.shape[0], weight.shape[1])
    large = space.take("magnitude", shape)
    if weight.dtype is torch.float32:
        return torch.abs(weight, out=large)
    large.copy_(torch.abs(weight, out=space.take("short", shape, weight.dtype)))
    return large


def block_largest(blocks: Tensor) -> Tensor:
    """The largest of each row of non-negative float32: their bits order like the numbers, and integers reduce faster."""
    return torch.amax(blocks.view(torch.int32), 1).view(torch.float32)


def _round(blocks: Tensor, scale: Tensor, space: Workspace) -> tuple[Tensor, Tensor]:
    """E2M1 of blocks / scale: (the sum with 2^(e+22) whose low bits are the code, the rounded magnitudes), both buffers of `space`."""
    shape = (blocks.shape[0], blocks.shape[1])
    quotient = torch.div(blocks, scale.view(-1, 1), out=space.take("quotient", shape)).clamp_(max=LARGEST)
    bits = space.take("large", shape, torch.int32)
    torch.bitwise_and(quotient.view(torch.int32), EXPONENT, out=bits).clamp_min_(ONE).add_(STEPS)
    large = bits.view(torch.float32)
    total = quotient.add_(large)
    return total, torch.sub(total, large, out=large)


def round_e2m1(blocks: Tensor, scale: Tensor, space: Workspace) -> Tensor:
    """The nearest E2M1 magnitudes of blocks / scale, a buffer of `space`: blocks [M, 16] of magnitudes, scale [M], both float32."""
    return _round(blocks, scale, space)[1]


def _best(blocks: Tensor, candidates: list[tuple[Tensor, Tensor]], space: Workspace) -> Tensor:
    """For each block the stored scale of least squared error, the first one of equals. Candidates are (stored, as float32) pairs."""
    if len(candidates) == 1:
        return candidates[0][0]
    best, least = candidates[0][0].clone(), torch.full((blocks.shape[0],), torch.inf)
    for stored, scale in candidates:
        rounded = round_e2m1(blocks, scale, space)
        # In units of the first scale: squares of tiny weights would vanish in float32.
        error = rounded.mul_(scale.view(-1, 1)).sub_(blocks).div_(candidates[0][1].view(-1, 1)).square_().sum(1)
        better = error < least
        best, least = torch.where(better, stored, best), torch.where(better, error, least)
    return best


def _finish(tile: Tile, weight: Tensor, blocks: Tensor, scale: Tensor, codes: Tensor, space: Workspace) -> ErrorSums:
    """Rounds a tile with its scales, stores the codes, and sums the error."""
    total, rounded = _round(blocks, scale, space)
    error = rounded.mul_(scale.view(-1, 1)).sub_(blocks)
    bits = total.view(torch.int32)
    bits.add_(torch.bitwise_right_shift(bits, TOP_BITS, out=space.take("exponent", tuple(bits.shape), torch.int32)))
    index = space.take("index", tuple(bits.shape), torch.uint8).copy_(bits)
    raw = tile.of(weight).view(INT_OF[weight.element_size()])
    shape = tuple(raw.shape)
    negative = torch.bitwise_right_shift(raw, SIGN_SHIFT[raw.element_size()], out=space.take("sign", shape, raw.dtype))
    all_ones = space.take("all_ones", shape, torch.uint8).copy_(negative)
    # 255 where negative, else 0; 255 * 248 is 8 modulo 256.
    torch.add(index.view(shape), all_ones, alpha=248, out=tile.of(codes))
    return error_sums(error, blocks)


def _values(codes: Tensor, values: Tensor, space: Workspace) -> None:
    """E2M1 values of codes, into `values`: the magnitudes are max(c / 2, c - 2, 2c - 8), a convex curve through the eight points."""
    shape = (codes.shape[0], codes.shape[1])
    index = space.take("index", shape).copy_(torch.bitwise_and(codes, 7, out=space.take("low", shape, torch.uint8)))
    other = space.take("other", shape)
    torch.mul(index, 0.5, out=values)
    torch.maximum(values, torch.sub(index, 2.0, out=other), out=values)
    torch.maximum(values, index.mul_(2.0).sub_(8.0), out=values)
    sign = space.take("sign", shape, torch.int32).copy_(torch.bitwise_and(codes, 8, out=space.take("low", shape, torch.uint8)))
    values.view(torch.int32).bitwise_or_(sign.bitwise_left_shift_(28))
