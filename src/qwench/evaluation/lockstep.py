"""Source and release read the same rows side by side, one block of each in memory at a time.

Every row's hidden states are kept, the model is not: a block's weights are read once, all rows go through it, and they are dropped. A model larger than
memory can be evaluated so; what it takes is one block, the head, and 2 x rows x length x hidden numbers. Since both models stand after the same block
at the same time, their relative difference there is known for every layer:

    error_i = || release_i - source_i || / || source_i ||     (Frobenius norm over all rows, after decoder layer i)

A hidden state that is not finite ends the pass with the block and the row that made it: nothing after it would mean anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwench.errors import CheckpointError
from qwench.machine import peak_rss


class Reader(Protocol):
    """What the pass asks of a trunk; `qwench.models.run.Trunk` is one. Hidden states are [rows, length, hidden]."""

    def embed(self, ids: Tensor) -> Tensor: ...

    def run_block(self, index: int, hidden: Tensor) -> Tensor: ...

    def norm(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Progress:
    """How far the pass is.

    Attributes:
        block, blocks: decoder layers that both models have behind them, and all of them.
        rows: rows in the pass.
        tokens_per_second: tokens that go through all decoder layers of both models in a second, at the pace so far.
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
class Reading:
    """What the pass leaves.

    Attributes:
        source, release: hidden states after the final norm, [rows, length, hidden].
        error_by_layer: see the module's formula, one number for each decoder layer.
    """

    source: Tensor
    release: Tensor
    error_by_layer: list[float]


@torch.no_grad()
def read_in_lockstep(
    source: Reader, release: Reader, ids: Tensor, blocks: int, progress: Callable[[Progress], None] | None = None
) -> Reading:
    """Both models' normed hidden states of the same rows.

    Args:
        source, release: the two trunks.
        ids: int64 [rows, length].
        blocks: decoder layers of each.
        progress: called after every block.

    Raises:
        CheckpointError: a hidden state is NaN or infinite; names model, block and row.
    """
    begun = time.monotonic()
    hidden_source, hidden_release = source.embed(ids), release.embed(ids)
    check_finite(hidden_source, "source", "the embedding")
    check_finite(hidden_release, "release", "the embedding")
    errors = []
    for block in range(blocks):
        hidden_source = _through(source, block, hidden_source, "source")
        hidden_release = _through(release, block, hidden_release, "release")
        errors.append(relative_difference(hidden_release, hidden_source))
        if progress:
            progress(_progress(block + 1, blocks, ids, time.monotonic() - begun))
    return Reading(source.norm(hidden_source), release.norm(hidden_release), errors)


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


def _through(reader: Reader, block: int, hidden: Tensor, model: str) -> Tensor:
    hidden = reader.run_block(block, hidden)
    check_finite(hidden, model, f"decoder layer {block}")
    return hidden


def _progress(done: int, blocks: int, ids: Tensor, seconds: float) -> Progress:
    pace = ids.numel() * (done / blocks) / max(seconds, 1e-9)
    return Progress(done, blocks, len(ids), pace, seconds / done * (blocks - done), peak_rss())
