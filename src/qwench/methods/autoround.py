"""AutoRound: learn which way to round. Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent" (arXiv:2309.05516).

Rounding each weight to its nearest code makes each weight's error smallest, not the block's. So every weight gets an offset V in [-0.5, 0.5] that is
added before rounding (it can turn a code up or down by one), and every group two factors in [0, 1] on its lowest and highest value. They are
tuned together for all weights of a decoder block, so that its output on calibration rows comes near that of the original block:

    q = round(w / s + V),  s from low * min(w), high * max(w)          p <- clamp(p - rate * sign(dL/dp))

Only the sign of the gradient is used: every parameter can travel the same way, and with rate 1 / iterations, falling to 0, V can just cross its range.
Inputs come from the quantized blocks before it, targets from the original ones: the block learns to undo what was lost before.

The tuned weights are plain leaves for the block; their gradient is carried on to V and the factors one matrix at a time, by blocks of rows. So a
block's graph is never joined with those of its roundings, and rows can be taken in portions, gradients adding up to the same step.

The iterate that is kept is the one of least error on one fixed set of rows, among iterates judged every few steps, the start (rounding to nearest)
included. What is judged is, bit for bit, what the returned codes decode to. Comparing losses of different batches would pick the luckiest batch.

What it trades away: time (about 700 passes of 8 rows a block by default), and memory: beside the weights 4 bytes for the offset, the decoded weight and
its gradient, 1 byte for the best codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwench.methods.tuned_matrix import TunedMatrix, round_trip_of, tuning_complaint
from qwench.numerics import Quantized, Scheme

__all__ = ["Options", "Report", "Run", "batches", "tune_block", "tuning_complaint"]

Run = Callable[[dict[str, Tensor], Tensor], Tensor]
"""The block: values of the tuned weights by name, and some rows of inputs -> its output. It holds all other weights itself."""


@dataclass(frozen=True)
class Options:
    """How to tune.

    Attributes:
        iterations: steps.
        batch: rows in a step.
        rate: of the offset's first step; None: 1 / iterations. It falls linearly to 0.
        range_rate: the same for the factors; None: as `rate`.
        seed: of the order of the rows.
        judge_every: steps between judgements.
        judge_rows: how many rows judge, taken evenly from all; None: all.
        activation_limit: bytes that may be held for the backward pass; rows of a step go in portions that fit. None: no limit.
        scale_dtype: what `int` scales are stored in.
    """

    iterations: int = 200
    batch: int = 8
    rate: float | None = None
    range_rate: float | None = None
    seed: int = 0
    judge_every: int = 10
    judge_rows: int | None = 32
    activation_limit: int | None = None
    scale_dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Report:
    """What tuning did to a block.

    Attributes:
        start_loss, best_loss: mean squared error of the block's output, rounded to nearest and as returned, on the same rows.
        best_iteration: steps behind what is returned; 0 is rounding to nearest.
        losses: (steps, loss) of every judgement.
        judged_rows: rows that judged.
        rows_at_once: rows that went through the block together.
        changed: share of the codes that differ from rounding to nearest, by weight.
        bytes_per_row: what autograd keeps for one row; None where no limit was set. Where one row alone is over the limit, it goes all the same.
        unreached: weights whose gradient was zero in every step (experts that no token was sent to): they stay rounded to nearest.
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

    @property
    def says(self) -> str:
        """One line for the log."""
        if not math.isfinite(self.start_loss):
            return f"the output with rounded weights is not finite (loss {self.start_loss}): rounded to nearest"
        if self.best_iteration == 0:
            return f"no step beats rounding to nearest (loss {self.start_loss:.4g})"
        gain = 1 - self.best_loss / self.start_loss
        return f"loss {self.start_loss:.4g} -> {self.best_loss:.4g} ({gain:.1%} less) after {self.best_iteration} steps"


def tune_block(
    run: Run,
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    inputs: Tensor,
    targets: Tensor,
    options: Options | None = None,
    outers: Mapping[str, Tensor | None] | None = None,
) -> tuple[dict[str, Quantized], Report]:
    """Rounds the weights of one block.

    Args:
        run: the block. Differentiable in the weights that it is given, which come in the dtype of `inputs`, on the device of the weights; what it holds
            itself asks for no gradient.
        weights: matrices [out, in] by name.
        schemes: of every one of them; none that `tuning_complaint` has something against.
        inputs: [rows, ...], outputs of the quantized blocks before; anywhere, also mapped from a file.
        targets: [rows, ...], what the original block makes of the original inputs.
        outers: `nvfp4` divisors of fused sets, float32 [1]; what is missing is that of the matrix alone.

    Returns:
        Codes and scales on the CPU by name, and what happened. The same seed gives the same result on the same machine.
    """
    options, outers = options or Options(), outers or {}
    assert weights and set(schemes) >= set(weights), (sorted(weights), sorted(schemes))
    matrices = {
        name: TunedMatrix(weight, schemes[name], outers.get(name), options.scale_dtype) for name, weight in weights.items()
    }
    block = _Block(run, matrices, inputs, targets, options)
    best = _Best({name: matrix.quantized() for name, matrix in matrices.items()}, block.judge())
    unreached = set(matrices)
    for step, rows in enumerate(batches(len(inputs), options), 1):
        if not math.isfinite(best.loss):
            break
        unreached -= block.step(rows, 1 - (step - 1) / options.iterations)
        if (step % options.judge_every == 0 or step == options.iterations) and best.improves(step, loss := block.judge()):
            best.take(step, loss, {name: matrix.quantized() for name, matrix in matrices.items()})
    report = Report(
        best.losses[0][1], best.loss, best.iteration, tuple(best.losses), len(block.jury), block.rows_at_once, block.bytes_per_row, best.changed(),
        tuple(sorted(unreached)),
    )  # fmt: skip
    return {name: replace(q, error=round_trip_of(weights[name], q)) for name, q in best.kept.items()}, report


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


class _Block:
    """The block, its rows, and the measure."""

    def __init__(self, run: Run, matrices: dict[str, TunedMatrix], inputs: Tensor, targets: Tensor, options: Options) -> None:
        assert len(inputs) == len(targets) > 0, (inputs.shape, targets.shape)
        self.run, self.matrices, self.inputs, self.targets, self.options = run, matrices, inputs, targets, options
        self.device = next(iter(matrices.values())).weight.device
        count = min(len(inputs), options.judge_rows or len(inputs))
        self.jury = torch.arange(count) * len(inputs) // count
        self.bytes_per_row: int | None = None
        self.rows_at_once = self._rows_that_fit()

    def judge(self) -> float:
        """Mean squared error of the output with the codes as they are now, on the fixed rows."""
        values = {name: matrix.values(self.inputs.dtype) for name, matrix in self.matrices.items()}
        with torch.no_grad():
            squares = [float(self._squares(values, rows)) for rows in torch.split(self.jury, self.rows_at_once)]
        return math.fsum(squares) / (len(self.jury) * self.targets[0].numel())

    def step(self, rows: Tensor, share: float) -> set[str]:
        """One step on these rows at this share of the first rate. Answers the weights that had a gradient."""
        leaves = self._leaves()
        elements = len(rows) * self.targets[0].numel()
        with torch.enable_grad():
            for some in torch.split(rows, self.rows_at_once):
                torch.autograd.backward(self._squares(leaves, some) / elements)
        rate = (1 / self.options.iterations if self.options.rate is None else self.options.rate) * share
        range_rate = rate if self.options.range_rate is None else self.options.range_rate * share
        reached = set()
        for name, leaf in leaves.items():
            if leaf.grad is not None and bool(leaf.grad.any()):
                reached.add(name)
                self.matrices[name].step(leaf.grad, rate, range_rate)
            leaf.grad = None
        return reached

    def _leaves(self) -> dict[str, Tensor]:
        return {name: matrix.values(self.inputs.dtype).requires_grad_() for name, matrix in self.matrices.items()}

    def _squares(self, values: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Sum of squared errors of the output, float32."""
        output = self.run(dict(values), self.inputs[rows].to(self.device))
        return (output.to(torch.float32) - self.targets[rows].to(self.device, torch.float32)).square().sum()

    def _rows_that_fit(self) -> int:
        """Rows whose activations stay within the limit; at least 1. Measured: what two rows make autograd keep, less what one does."""
        most = min(self.options.batch, len(self.inputs))
        if self.options.activation_limit is None:
            return most
        leaves = self._leaves()
        one, two = (self._kept_bytes(leaves, rows) for rows in (1, min(2, len(self.inputs))))
        # What does not grow with the rows are weights that the block holds itself.
        self.bytes_per_row = max(1, two - one if len(self.inputs) > 1 else one)
        return max(1, min(most, self.options.activation_limit // self.bytes_per_row))

    def _kept_bytes(self, leaves: dict[str, Tensor], rows: int) -> int:
        """Bytes that autograd keeps for the backward pass of so many rows, weights not counted."""
        kept: dict[int, int] = {}
        own = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self._squares(leaves, torch.arange(rows))
        return sum(kept.values())


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
