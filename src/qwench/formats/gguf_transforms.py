"""What happens to a weight's values on their way into a GGUF file, apart from rounding.

llama.cpp computes the same network from other numbers: its norms multiply by the stored weight where transformers multiplies by 1 + weight, its decay is the
stored number where transformers takes -exp, and its Gated DeltaNet repeats the key heads as a whole ([K0, K1, K0, K1 ...]) where transformers repeats each one in
place ([K0, K0, K1, K1 ...]), so that the value heads have to stand in another order:

    grouped (stored by transformers)   K0: V0 V1 V2 | K1: V3 V4 V5
    tiled   (read by llama.cpp)        V0 V3 | V1 V4 | V2 V5

Each transform is a value of its own, so that a plan can be compared and printed. All compute in the dtype that comes in; give them float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """A change of values that keeps a weight's meaning for llama.cpp.

    Attributes:
        by_rows: some rows of the result need the same rows of the input and no others.
    """

    @property
    def by_rows(self) -> bool: ...

    def apply(self, weight: Tensor) -> Tensor:
        """The weight for the file."""
        ...

    def undo(self, stored: Tensor) -> Tensor:
        """The checkpoint's weight from the file's."""
        ...


@dataclass(frozen=True)
class PlusOne:
    """A zero-centred norm: 1 + w."""

    by_rows = True

    def apply(self, weight: Tensor) -> Tensor:
        return weight + 1

    def undo(self, stored: Tensor) -> Tensor:
        return stored - 1


@dataclass(frozen=True)
class NegativeExponential:
    """The decay of Gated DeltaNet from its logarithm: -exp(w)."""

    by_rows = True

    def apply(self, weight: Tensor) -> Tensor:
        return -torch.exp(weight)

    def undo(self, stored: Tensor) -> Tensor:
        return torch.log(-stored)


@dataclass(frozen=True)
class Squeeze:
    """A causal convolution [channels, 1, taps] as a matrix [channels, taps]."""

    by_rows = True

    def apply(self, weight: Tensor) -> Tensor:
        return weight.squeeze(1)

    def undo(self, stored: Tensor) -> Tensor:
        return stored.unsqueeze(1)


@dataclass(frozen=True)
class Frame:
    """The part of a patch embedding [out, colours, frames, rows, columns] that belongs to one of its frames: [out, colours, rows, columns]."""

    index: int
    by_rows = True

    def apply(self, weight: Tensor) -> Tensor:
        return weight[:, :, self.index].contiguous()

    def undo(self, stored: Tensor) -> Tensor:
        return stored.unsqueeze(2)


@dataclass(frozen=True)
class TileHeads:
    """Value heads from grouped to tiled order.

    Attributes:
        keys: key heads.
        values: value heads, a multiple of them.
        width: rows (or columns) of one head.
        dimension: 0 for rows, -1 for columns.
        start: rows before the first value head, which stay where they are (queries and keys).
    """

    keys: int
    values: int
    width: int
    dimension: int = 0
    start: int = 0

    @property
    def by_rows(self) -> bool:
        return self.dimension != 0

    def order(self) -> Tensor:
        """int64: which of the input's rows (or columns) each of the output's is."""
        heads = torch.arange(self.values).view(self.keys, -1).T.reshape(-1, 1)
        tiled = heads * self.width + torch.arange(self.width)
        return torch.cat([torch.arange(self.start), self.start + tiled.flatten()])

    def apply(self, weight: Tensor) -> Tensor:
        order = self.order()
        assert len(order) == weight.shape[self.dimension], f"{len(order)} rows or columns in {list(weight.shape)}"
        return weight.index_select(self.dimension % weight.dim(), order)

    def undo(self, stored: Tensor) -> Tensor:
        return stored.index_select(self.dimension % stored.dim(), torch.argsort(self.order()))
