"""What a network remembers of a sequence that it reads bit by bit, and how it forgets the end of it again.

Speculative decoding reads drafts that are then refused: everything that reading them has changed must be undone. The two mixers remember differently.

- Full attention keeps the keys and values of every position. Forgetting is cutting them off: `KeyValues.rewind`.
- Gated DeltaNet keeps one matrix for each head, whatever the length, and the last inputs of its convolution. A position that was folded into the matrix cannot be taken
  out of it: the decay and the delta rule would have to be inverted, which rounding forbids. So the states after each position of a short stretch are kept as it
  is read, and forgetting is going back to one of them: `DeltaStates.rewind`. A state is never written to once it is made, so keeping one costs its memory and no copy.

One sequence at a time: rows of a batch would be refused at different positions.

Letters in names: T positions, G key-value heads, A width of a head, C convolved channels, H value heads of Gated DeltaNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_ROOM = 64
"""Positions that the first buffer of keys and values has room for; it doubles from there."""


class KeyValues:
    """Keys and values of the positions read so far, for one layer with full attention.

    It stands in for the cache of transformers: its attention hands over new keys and values and goes on with what `update` returns.

    Attributes:
        length: positions that it holds.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys = self._values = torch.empty(1, 0, 0, 0)

    def update(self, keys_1GTA: Tensor, values_1GTA: Tensor, layer_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Append positions; all keys and all values, [1, G, length, A] each (views that the next `update` may overwrite after a `rewind`)."""
        start, self.length = self.length, self.length + keys_1GTA.shape[2]
        if self.length > self._keys.shape[2]:
            self._keys, self._values = (
                self._larger(old, new, start) for old, new in ((self._keys, keys_1GTA), (self._values, values_1GTA))
            )
        self._keys[:, :, start : self.length], self._values[:, :, start : self.length] = keys_1GTA, values_1GTA
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def rewind(self, length: int) -> None:
        """Forget everything from position `length` on."""
        assert 0 <= length <= self.length, f"{self.length} positions were read, none can be made up to {length}"
        self.length = length

    def _larger(self, held: Tensor, new: Tensor, used: int) -> Tensor:
        room = max(FIRST_ROOM, 2 * held.shape[2], self.length)
        larger = new.new_empty(1, new.shape[1], room, new.shape[3])
        if used:
            larger[:, :, :used] = held[:, :, :used]
        return larger


@dataclass(frozen=True)
class DeltaState:
    """What a Gated DeltaNet layer carries from one position to the next.

    Attributes:
        inputs: the last kernel - 1 inputs of the convolution [1, C, kernel - 1], in the compute dtype; zeros before the first position.
        recurrent: float32 [1, H, width of a key, width of a value]; None before the first position.
    """

    inputs: Tensor
    recurrent: Tensor | None = None


class DeltaStates:
    """The state of one Gated DeltaNet layer after the positions read so far, and those that can be gone back to.

    Attributes:
        length: positions that were read.
    """

    def __init__(self, first: DeltaState) -> None:
        self.length = 0
        self._after: dict[int, DeltaState] = {0: first}

    @property
    def current(self) -> DeltaState:
        return self._after[self.length]

    def advance(self, count: int, after: Mapping[int, DeltaState]) -> None:
        """Read `count` positions more.

        Args:
            after: the state after so many of them: after each number from 1 to `count`, and then the state before them is kept too; or after all
                of them alone, and then nothing else is.
        """
        assert count in after, "the state that reading goes on from is missing"
        before = {0: self.current} if len(after) == count else {}
        self._after = {self.length + number: state for number, state in {**before, **after}.items()}
        self.length += count

    def rewind(self, length: int) -> None:
        """Go back to the state after `length` positions, one of those kept by the last `advance`."""
        assert length in self._after, f"the state after {length} positions was not kept, only those after {sorted(self._after)}"
        self._after = {number: state for number, state in self._after.items() if number <= length}
        self.length = length


def causal_mask(count: int, length: int, device: torch.device | None = None) -> Tensor | None:
    """Which of `length` positions each of the last `count` may read: bool [1, 1, count, length]; None where attention's own rule says the same (one query, or
    no positions before the first)."""
    if count in (1, length):
        return None
    places = torch.arange(length, device=device)
    return (places <= places[length - count :, None])[None, None]
