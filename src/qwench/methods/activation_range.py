"""How large the blocks of an activation get, and the NVFP4 divisor that suits them.

NVFP4 rounds activations in blocks of 16 numbers of a token, each with an FP8 scale that is found as the block comes (see `numerics.activation`). What is left to calibrate is one
number for the whole tensor, the largest block that it can take without cutting it off, the *range*; the divisor is 448 * 6 / range. Only the largest
magnitude of each block matters to it: too small a range cuts large blocks off, too large a range pushes small blocks, those below 1/28,672 of it, among the subnormal scales of
E4M3, which are coarser, and in the end to zero. In between nothing changes but where scales fall between two numbers of E4M3.

Three choices:

- `amax`: the largest block seen. Nothing that was seen is cut off.
- `percentile`: the range that holds a stated percentage of the blocks. Outliers are cut off.
- `mse`: of ranges from twice amax to amax / 1024 that of least squared rounding error over the blocks that were seen.

What is kept is bounded however many tokens pass by: the count of blocks in each 32nd of a binary order of their largest magnitude, and for `mse` a few blocks of each binary order,
drawn at random, each standing for its share of that order's count, so that the rare large blocks are judged by examples of their own. Counts add up in any order. Tokens
with numbers that are not finite are left out and counted.

Letters in names: N tokens, I input channels, M blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qwench.numerics import largest_magnitude, outer_scale
from qwench.numerics.activation import GROUP, round_nvfp4
from qwench.numerics.float4 import E4M3_LARGEST, E4M3_SMALLEST_NORMAL

NORMAL_RANGE = E4M3_LARGEST / E4M3_SMALLEST_NORMAL
"""How much smaller than the largest a scale can be without losing precision."""

Choice = Literal["amax", "percentile", "mse"]

SHIFT = 18
"""Bits of a float32 below those that make its bin: five of the mantissa are left, 32 bins in a binary order."""
BINS = 1 << (31 - SHIFT)
ORDERS = 256
"""Binary orders of float32 magnitudes, by exponent."""
EXAMPLES = 32
"""Blocks kept of each binary order."""
STEPS = 4
"""Ranges that `mse` tries in each binary order."""
FACTORS: tuple[float, ...] = tuple(2.0 ** (1 - step / STEPS) for step in range(11 * STEPS + 1))
"""Of amax: from 2 down to 2^-10. The larger of equals wins: room above what was seen costs nothing where no block is small."""


@dataclass
class Examples:
    """Blocks drawn at random from those that passed by, up to `EXAMPLES` of each binary order: those with the smallest of keys that every block draws.

    Attributes:
        blocks: by order, float32 [at most EXAMPLES, 16].
        keys: theirs, float32 [at most EXAMPLES].
        generator: where keys come from.
    """

    blocks: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def add(self, blocks: Tensor, orders: Tensor) -> None:
        """Take in blocks [M, 16] of these orders, int64 [M]."""
        keys, orders = torch.rand(len(blocks), generator=self.generator), orders.cpu()
        limits = torch.full((ORDERS,), torch.inf)
        for order, kept in self.keys.items():
            if len(kept) == EXAMPLES:
                limits[order] = kept.max()
        new = (keys < limits[orders]).nonzero().flatten()
        for order in torch.unique(orders[new]).tolist():
            mine = new[orders[new] == order]
            self._merge(order, blocks[mine.to(blocks.device)].cpu(), keys[mine])

    def __add__(self, other: Examples) -> Examples:
        both = Examples()
        for some in (self, other):
            for order in some.keys:
                both._merge(order, some.blocks[order], some.keys[order])
        return both

    def _merge(self, order: int, blocks: Tensor, keys: Tensor) -> None:
        if order in self.keys:
            blocks, keys = torch.cat([self.blocks[order], blocks]), torch.cat([self.keys[order], keys])
        best = keys.argsort()[:EXAMPLES]
        self.blocks[order], self.keys[order] = blocks[best].clone(), keys[best]


@dataclass
class BlockSizes:
    """How large the blocks of one input are.

    Attributes:
        tokens: that were looked at, those left out not among them.
        left_out: tokens with numbers that are not finite.
        amax: the largest magnitude.
        counts: int64 [BINS], blocks by the upper bits of their largest magnitude; blocks of zeros are in the first bin.
        examples: for `mse`, None otherwise.
    """

    tokens: int = 0
    left_out: int = 0
    amax: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    examples: Examples | None = None

    def add(self, inputs_NI: Tensor) -> None:
        """Take in more tokens."""
        inputs_NI = self._finite(inputs_NI)
        if not inputs_NI.numel():
            return
        blocks = inputs_NI.float().reshape(-1, GROUP)
        largest = blocks.abs().amax(1)
        bins = largest.view(torch.int32).bitwise_right_shift(SHIFT).long()
        self.counts += torch.bincount(bins, minlength=BINS).cpu()
        self.tokens += len(inputs_NI)
        self.amax = max(self.amax, float(largest.max()))
        if self.examples is not None:
            self.examples.add(blocks, bins >> (23 - SHIFT))

    def __add__(self, other: BlockSizes) -> BlockSizes:
        examples = self.examples + other.examples if self.examples and other.examples else None
        tokens, left_out = self.tokens + other.tokens, self.left_out + other.left_out
        return BlockSizes(tokens, left_out, max(self.amax, other.amax), self.counts + other.counts, examples)

    def share_above(self, largest: float) -> float:
        """Share of blocks that a range cuts off, to the width of a bin."""
        return float(self.counts[_bin_of(largest) + 1 :].sum() / self.counts.sum().clamp_min(1))

    def share_coarse(self, largest: float) -> float:
        """Share of blocks whose scales, under a range, lie below the normal numbers of E4M3, to the width of a bin; blocks of zeros are exact and not among them."""
        return float(self.counts[1 : _bin_of(largest / NORMAL_RANGE)].sum() / self.counts.sum().clamp_min(1))

    def _finite(self, inputs_NI: Tensor) -> Tensor:
        """The tokens that can be looked at; the others are counted."""
        if math.isfinite(largest_magnitude(inputs_NI)):
            return inputs_NI
        sound = inputs_NI.isfinite().all(1)
        self.left_out += int((~sound).sum())
        return inputs_NI[sound]


def chosen_range(sizes: BlockSizes, choice: Choice = "amax", percentile: float = 99.99) -> float:
    """The largest block that is not to be cut off; 0 where nothing but zeros, or nothing at all, was seen.

    Args:
        sizes: what was seen; with examples if the choice is `mse`.
        percentile: of blocks, for the choice of that name.
    """
    if choice == "percentile":
        return min(sizes.amax, _percentile(sizes.counts, percentile))
    if choice == "mse" and sizes.amax > 0:
        return least_error_range(sizes)
    return sizes.amax


def divisor(largest: float) -> float:
    """The NVFP4 divisor of a range, 448 * 6 / range, rounded towards 0 to a number of bfloat16.

    Readers that cast every stored number to the dtype of the model then read it as it is; the range grows by 0.8% at most.
    """
    outer = outer_scale(largest)
    return float(outer.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32))


def _bin_of(value: float) -> int:
    return int(torch.tensor([value], dtype=torch.float32).view(torch.int32)) >> SHIFT


def _percentile(counts: Tensor, percentile: float) -> float:
    """The upper end of the bin in which the stated percentage of blocks is reached."""
    total = int(counts.sum())
    if not total:
        return 0.0
    reached = torch.searchsorted(counts.cumsum(0).double(), torch.tensor(percentile / 100 * total, dtype=torch.float64))
    bits = (int(reached) + 1 << SHIFT) - 1
    return float(torch.tensor([bits], dtype=torch.int32).view(torch.float32))


def least_error_range(sizes: BlockSizes) -> float:
    """The range of least squared rounding error; each example stands for its share of the blocks of its order."""
    assert sizes.examples is not None, "mse is chosen before anything is seen"
    orders = sizes.counts.view(ORDERS, -1).sum(1)
    kept = sizes.examples.blocks
    blocks = torch.cat(list(kept.values()))
    shares = torch.cat([(orders[order] / len(mine)).expand(len(mine)) for order, mine in kept.items()]).double()
    unit = 1 / sizes.amax  # squares of tiny numbers would vanish

    def error(largest: float) -> float:
        gone = (round_nvfp4(blocks, divisor(largest)) - blocks).mul_(unit)
        return float((gone.double().square().sum(1) * shares).sum())

    ranges = [factor * sizes.amax for factor in FACTORS]
    return min(ranges, key=error)
