"""Source and release read the same rows side by side, one block of each in memory at a time.

Every row's hidden states are kept, the model is not: a block's weights are read once, all rows go through it, and they are dropped. A model larger than
memory can be evaluated so; what it takes is one block, the head, and for each model rows x length x hidden numbers, and blocks x positions x hidden for those positions that are
looked at after every block. A release can be read in several ways at once (with its low-rank corrections, and without): the source goes through once. Since all stand after the same block
at the same time, their relative difference from the source there is known for every layer:

    error_i = || release_i - source_i || / || source_i ||     (Frobenius norm over all rows, after decoder layer i)

That error has come through all layers before. What a layer adds by itself is seen where it is given what the source's layer is given: the last rows of every batch that goes through a layer of the
release are the source's hidden states before it (every fourth row), and what comes out is compared with what the source's layer makes of the same:

    own_i = || release's layer i (source_(i-1)) - source_i || / || source_i ||     (over these rows)

A hidden state that is not finite ends the pass with the block and the row that made it: nothing after it would mean anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwench.errors import CheckpointError
from qwench.machine import peak_rss

OWN = 4
"""Of so many rows, one is also taken through each layer of a release alone."""


class Reader(Protocol):
    """What the pass asks of a trunk; `qwench.models.run.Trunk` is one. Hidden states are [rows, length, hidden]."""

    def embed(self, ids: Tensor) -> Tensor: ...

    def run_block(self, index: int, hidden: Tensor) -> Tensor: ...

    def norm(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Progress:
    """How far the pass is.

    Attributes:
        block, blocks: decoder layers that all models have behind them, and all of them.
        rows: rows in the pass.
        tokens_per_second: tokens that go through all decoder layers of all models in a second, at the pace so far.
        seconds_left: at this pace.
        peak_rss: largest resident memory of this process until now, bytes.
    """

    block: int
    blocks: int
    rows: int
    tokens_per_second: float
    seconds_left: float
    peak_rss: int


@dataclass(frozen=True)
class Read:
    """What the pass leaves of one model.

    Attributes:
        normed: hidden states after the final norm, [rows, length, hidden].
        by_layer: hidden states after each decoder layer at the positions that were asked for, after the final norm too, [blocks, positions, hidden].
        errors, own: see the module's formulas, one number for each decoder layer; of the source, none.
    """

    normed: Tensor
    by_layer: Tensor
    errors: list[float]
    own: list[float]


@dataclass(frozen=True)
class Reading:
    """The source, and each reading of the release by its name."""

    source: Read
    releases: dict[str, Read]


@torch.no_grad()
def read_in_lockstep(
    source: Reader,
    releases: Mapping[str, Reader],
    ids: Tensor,
    blocks: int,
    progress: Callable[[Progress], None] | None = None,
    positions: Tensor | None = None,
) -> Reading:
    """All models' normed hidden states of the same rows.

    Args:
        source: its trunk.
        releases: name -> trunk; the names are for messages and for the result.
        ids: int64 [rows, length].
        blocks: decoder layers of each.
        progress: called after every block.
        positions: int64 [positions], which of all positions, counted row by row, are kept after every layer; None for none.

    Raises:
        CheckpointError: a hidden state is NaN or infinite; names model, block and row.
    """
    begun, kept = time.monotonic(), torch.empty(0, dtype=torch.int64) if positions is None else positions
    first, others = (
        _Walker("source", source, ids, kept),
        [_Follower(name, reader, ids, kept) for name, reader in releases.items()],
    )
    for block in range(blocks):
        for other in others:
            other.take(first.hidden)
        first.step(block)
        for other in others:
            other.step(block)
            other.compare(first.hidden)
        if progress:
            progress(_progress(block + 1, blocks, ids, time.monotonic() - begun))
    return Reading(first.read(), {other.name: other.read() for other in others})


class _Walker:
    """One model on its way through the blocks."""

    def __init__(self, name: str, reader: Reader, ids: Tensor, positions: Tensor) -> None:
        self.name, self.reader, self.positions = name, reader, positions
        self.rows = len(ids)
        self.hidden = reader.embed(ids)
        self.errors: list[float] = []
        self.own: list[float] = []
        self._kept: list[Tensor] = []
        check_finite(self.hidden, name, "the embedding")

    def step(self, block: int) -> None:
        self.hidden = self.reader.run_block(block, self.hidden)
        check_finite(self.hidden, self.name, f"decoder layer {block}")
        self._kept.append(self.hidden[: self.rows].flatten(0, 1)[self.positions])

    def read(self) -> Read:
        normed, kept = self.reader.norm(self.hidden[: self.rows]), self.reader.norm(torch.stack(self._kept))
        return Read(normed, kept, self.errors, self.own)


class _Follower(_Walker):
    """A release beside the source: behind its own rows go some of the source's, evenly spaced, anew before every block."""

    def __init__(self, name: str, reader: Reader, ids: Tensor, positions: Tensor) -> None:
        super().__init__(name, reader, ids, positions)
        self.borrowed = torch.arange(0, len(ids), OWN)
        self.hidden = torch.cat([self.hidden, self.hidden[self.borrowed]])

    def take(self, source: Tensor) -> None:
        self.hidden[self.rows :] = source[self.borrowed]

    def compare(self, source: Tensor) -> None:
        self.errors.append(relative_difference(self.hidden[: self.rows], source))
        self.own.append(relative_difference(self.hidden[self.rows :], source[self.borrowed]))


def relative_difference(values: Tensor, reference: Tensor) -> float:
    """|| values - reference || / || reference ||, sums in float64; 0 where both are zero, infinite where only the reference is."""
    pairs = list(zip(values, reference, strict=True))  # row by row: the difference of all rows at once would be one more copy
    difference = sum(float((v.float() - r.float()).square().sum(dtype=torch.float64)) for v, r in pairs)
    size = sum(float(r.float().square().sum(dtype=torch.float64)) for _, r in pairs)
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return float((difference / size) ** 0.5)


def check_finite(hidden: Tensor, model: str, where: str) -> None:
    """Raise CheckpointError naming the first row that holds NaN or infinity."""
    for row, values in enumerate(hidden):
        if not torch.isfinite(values).all():
            count = int((~torch.isfinite(values)).sum())
            raise CheckpointError(
                f"the {model}'s hidden states are not finite after {where}: row {row}, {count} of {values.numel()} values",
                "look for NaN or infinity in the weights of that layer; compute in float32 or bfloat16, never in float16",
            )


def _progress(done: int, blocks: int, ids: Tensor, seconds: float) -> Progress:
    pace = ids.numel() * (done / blocks) / max(seconds, 1e-9)
    return Progress(done, blocks, len(ids), pace, seconds / done * (blocks - done), peak_rss())
