"""AutoRound: learn which way to round. Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent" (arXiv:2309.05516).

Rounding each weight to its nearest code makes each weight's error smallest, not the block's. So every weight gets an offset V in [-0.5, 0.5] that is
added before rounding (it can turn a code up or down by one), and every group two factors in [0, 1] on its lowest and highest value. They are
tuned together for all weights of a decoder block, so that its output on calibration rows comes near that of the original block:

    q = round(w / s + V),  s from low * min(w), high * max(w)          p <- clamp(p - rate * sign(dL/dp))

Only the sign of the gradient is used: every parameter can travel the same way, and with rate 1 / iterations, falling to 0, V can just cross its range.
Inputs come from the quantized blocks before it, targets from the original ones: the block learns to undo what was lost before.

The tuned weights are plain leaves for the block; their gradient is carried on to V and the factors one matrix at a time, by blocks of rows. So a
block's graph is never joined with those of its roundings, and rows can be taken in portions, gradients adding up to the same step. Weights that are
parts of one parameter of the block (the experts of a mixture) are written into it where they lie.

The iterate that is kept is the one of least error on one fixed set of rows, among iterates judged every few steps, the start (rounding to nearest)
included. What is judged is, bit for bit, what the returned codes decode to. Comparing losses of different batches would pick the luckiest batch.

A start that is given (`starts`) takes the place of rounding to nearest: each weight is moved into the cell of the code that it was given, no further than it
must, and V and the factors begin at 0 and 1 there. Error feedback (GPTQ) is a far better start for the layer's own error than signed steps reach in a few
hundred; what tuning adds is what feedback cannot see: the block as a whole, and errors of the blocks before it. Where it adds nothing the start is kept.

What it trades away: time (about 700 passes of 8 rows a block by default), and memory: beside the weights 4 bytes for each of the offset, the decoded
weight and its gradient, 1 byte for each of the best codes and those of the start. Of the rows only those of a step are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwench.methods.tuned_block import Held, Homes, Options, Rows, Run, TunedBlock
from qwench.methods.tuned_matrix import TunedMatrix, round_trip_of, tuning_complaint
from qwench.numerics import Quantized, Scheme

__all__ = ["Homes", "Options", "Report", "Rows", "Run", "batches", "tune_block", "tuning_complaint"]


@dataclass(frozen=True)
class Report:
    """What tuning did to a block.

    Attributes:
        start_loss, best_loss: mean squared error of the block's output, as it started and as returned, on the same rows.
        best_iteration: steps behind what is returned; 0 is the start: rounding to nearest where none was given.
        losses: (steps, loss) of every judgement.
        judged_rows: rows that judged.
        rows_at_once: rows that went through the block together.
        changed: share of the codes that differ from the start, by weight.
        bytes_per_row: what autograd keeps for one row; None where no limit was set. Where one row alone is over the limit, it goes all the same.
        unreached: weights whose gradient was zero in every step (experts that no token was sent to): they stay as they started.
        given: whether the start was given, and is not rounding to nearest.
    """

    start_loss: float
    best_loss: float
    best_iteration: int
    losses: tuple[tuple[int, float], ...]
    judged_rows: int
    rows_at_once: int
    bytes_per_row: int | None
    changed: dict[str, float]
    unreached: tuple[str, ...]
    given: bool = False

    @property
    def says(self) -> str:
        """One line for the log."""
        if not math.isfinite(self.start_loss):
            return f"the output with rounded weights is not finite (loss {self.start_loss}): nothing was tuned"
        missed = f"; {len(self.unreached)} weights were never reached and stay as they started" if self.unreached else ""
        if self.best_iteration == 0:
            return f"no step beats {'the start' if self.given else 'rounding to nearest'} (loss {self.start_loss:.4g}){missed}"
        gain = 1 - self.best_loss / self.start_loss
        return f"loss {self.start_loss:.4g} -> {self.best_loss:.4g} ({gain:.1%} less) after {self.best_iteration} steps{missed}"


def tune_block(
    run: Run,
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    inputs: Tensor | Rows,
    targets: Tensor | Rows,
    options: Options | None = None,
    outers: Mapping[str, Tensor | None] | None = None,
    starts: Mapping[str, Quantized] | None = None,
    homes: Homes | None = None,
) -> tuple[dict[str, Quantized], Report]:
    """Rounds the weights of one block.

    Args:
        run: the block. Differentiable in the parameters that it is given, on the device of the weights; what it holds itself asks for no gradient.
        weights: matrices [out, in] by name, in the dtype that the block computes in; not changed.
        schemes: of every one of them; none that `tuning_complaint` has something against.
        inputs: [rows, ...], outputs of the quantized blocks before; anywhere, in any floating dtype.
        targets: [rows, ...], what the original block makes of the original inputs.
        outers: `nvfp4` divisors of fused sets, float32 [1]; what is missing is that of the matrix alone.
        starts: codes and scales to start from, such as GPTQ's; what is missing starts at rounding to nearest.
        homes: where weights are parts of parameters; None: each is one.

    Returns:
        Codes and scales on the CPU by name, and what happened. The same seed gives the same result on the same machine.
    """
    options, outers, starts = options or Options(), outers or {}, starts or {}
    assert weights and set(schemes) >= set(weights), (sorted(weights), sorted(schemes))
    matrices = {
        name: TunedMatrix(weight, schemes[name], outers.get(name), options.scale_dtype, starts.get(name))
        for name, weight in weights.items()
    }
    rows = [Held(some) if isinstance(some, Tensor) else some for some in (inputs, targets)]
    block = TunedBlock(run, matrices, homes or Homes(), rows[0], rows[1], options)
    best = _Best({name: matrix.quantized() for name, matrix in matrices.items()}, block.judge())
    unreached = set(matrices)
    for step, some in enumerate(batches(rows[0].shape[0], options), 1):
        if not math.isfinite(best.loss):
            break
        unreached -= block.step(some, 1 - (step - 1) / options.iterations)
        if is_judged(step, options) and best.improves(step, loss := block.judge()):
            best.take(step, loss, {name: matrix.quantized() for name, matrix in matrices.items()})
    report = Report(
        best.losses[0][1], best.loss, best.iteration, tuple(best.losses), len(block.jury), block.rows_at_once, block.bytes_per_row, best.changed(),
        tuple(sorted(unreached)), bool(starts),
    )  # fmt: skip
    return {name: replace(q, error=round_trip_of(weights[name], q)) for name, q in best.kept.items()}, report


def is_judged(step: int, options: Options) -> bool:
    """Whether the iterate behind a step is judged; the last one always is."""
    return step == options.iterations or (step % options.judge_every == 0 and step >= options.judge_from * options.iterations)


def batches(rows: int, options: Options) -> Iterator[Tensor]:
    """Row numbers of every step: one shuffle after the other, so that all rows are used alike."""
    generator = torch.Generator().manual_seed(options.seed)
    waiting, size = torch.empty(0, dtype=torch.int64), min(options.batch, rows)
    for _ in range(options.iterations):
        if len(waiting) < size:
            # Rows left over come first, and not twice in one batch.
            fresh = torch.randperm(rows, generator=generator)
            again = torch.isin(fresh, waiting)
            waiting = torch.cat([waiting, fresh[~again], fresh[again]])
        batch, waiting = waiting[:size], waiting[size:]
        yield batch


class _Best:
    """The best codes so far; the first ones of equals."""

    def __init__(self, start: dict[str, Quantized], loss: float) -> None:
        self.start = self.kept = start
        self.loss, self.iteration = loss, 0
        self.losses = [(0, loss)]

    def improves(self, iteration: int, loss: float) -> bool:
        """Notes a judgement; whether it is better than all before it."""
        self.losses.append((iteration, loss))
        return loss < self.loss

    def take(self, iteration: int, loss: float, codes: dict[str, Quantized]) -> None:
        self.kept, self.loss, self.iteration = codes, loss, iteration

    def changed(self) -> dict[str, float]:
        """Share of codes that are not those of the start."""
        return {name: float((q.codes != self.start[name].codes).float().mean()) for name, q in self.kept.items()}
