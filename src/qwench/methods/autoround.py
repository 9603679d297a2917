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

What it trades away: time (about 700 passes of 8 rows a block by default), and memory: beside the weights 4 bytes for each of the offset, the decoded
weight and its gradient, 1 byte for each of the best codes and those of the start. Of the rows only those of a step are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from qwench.methods.tuned_matrix import TunedMatrix, round_trip_of, tuning_complaint
from qwench.numerics import Quantized, Scheme

__all__ = ["Options", "Report", "Run", "batches", "tune_block", "tuning_complaint"]

Run = Callable[[dict[str, Tensor], Tensor], Tensor]
"""The block: values of the tuned weights by parameter, and some rows of inputs -> its output. It holds all other parameters itself."""


class Rows(Protocol):
    """Rows [rows, ...] that lie somewhere and are read when they are needed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def pick(self, rows: Tensor, /) -> Tensor:
        """Some of them by number, in the order asked for."""


@dataclass(frozen=True)
class Held:
    """Rows that are in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def pick(self, rows: Tensor, /) -> Tensor:
        return self.tensor[rows.to(self.tensor.device)]


@dataclass(frozen=True)
class Homes:
    """Where the weights lie in the parameters of the block.

    Attributes:
        parameters: by name; the tuned weights are written into them, and their gradient is taken. What else they hold stays.
        places: of a weight, the parameter and the part of it; what is missing is a parameter of its own, under its own name.
    """

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    places: Mapping[str, tuple[str, tuple[int | slice, ...]]] = field(default_factory=dict)


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
    block = _Block(run, matrices, homes or Homes(), rows[0], rows[1], options)
    best = _Best({name: matrix.quantized() for name, matrix in matrices.items()}, block.judge())
    unreached = set(matrices)
    for step, some in enumerate(batches(rows[0].shape[0], options), 1):
        if not math.isfinite(best.loss):
            break
        unreached -= block.step(some, 1 - (step - 1) / options.iterations)
        if (step % options.judge_every == 0 or step == options.iterations) and best.improves(step, loss := block.judge()):
            best.take(step, loss, {name: matrix.quantized() for name, matrix in matrices.items()})
    report = Report(
        best.losses[0][1], best.loss, best.iteration, tuple(best.losses), len(block.jury), block.rows_at_once, block.bytes_per_row, best.changed(),
        tuple(sorted(unreached)), bool(starts),
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

    def __init__(
        self, run: Run, matrices: dict[str, TunedMatrix], homes: Homes, inputs: Rows, targets: Rows, options: Options
    ) -> None:
        self.rows = inputs.shape[0]
        assert self.rows == targets.shape[0] > 0, (inputs.shape, targets.shape)
        self.run, self.matrices, self.inputs, self.targets, self.options = run, matrices, inputs, targets, options
        weight = next(iter(matrices.values())).weight
        self.device, self.dtype = weight.device, weight.dtype
        self.elements = math.prod(targets.shape[1:])
        self.parameters, self.views = self._parameters(homes)
        count = min(self.rows, options.judge_rows or self.rows)
        self.jury = torch.arange(count) * self.rows // count
        self.bytes_per_row: int | None = None
        self.rows_at_once = self._rows_that_fit()

    def judge(self) -> float:
        """Mean squared error of the output with the codes as they are now, on the fixed rows."""
        self._write()
        with torch.no_grad():
            squares = [float(self._squares(rows)) for rows in torch.split(self.jury, self.rows_at_once)]
        return math.fsum(squares) / (len(self.jury) * self.elements)

    def step(self, rows: Tensor, share: float) -> set[str]:
        """One step on these rows at this share of the first rate. Answers the weights that had a gradient."""
        self._write()
        with torch.enable_grad():
            for some in torch.split(rows, self.rows_at_once):
                torch.autograd.backward(self._squares(some) / (len(rows) * self.elements))
        rate = (1 / self.options.iterations if self.options.rate is None else self.options.rate) * share
        range_rate = rate if self.options.range_rate is None else self.options.range_rate * share
        reached = set()
        for name, (parameter, part) in self.views.items():
            gradient = self.parameters[parameter].grad
            if gradient is not None and bool(gradient[part].any()):
                reached.add(name)
                self.matrices[name].step(gradient[part], rate, range_rate)
        for leaf in self.parameters.values():
            leaf.grad = None
        return reached

    def _parameters(self, homes: Homes) -> tuple[dict[str, Tensor], dict[str, tuple[str, tuple[int | slice, ...]]]]:
        """The leaves by parameter, and for each weight the parameter and the part of it that it is."""
        views = {name: homes.places.get(name, (name, ())) for name in self.matrices}
        leaves: dict[str, Tensor] = {}
        for name, (parameter, _) in views.items():
            if parameter not in leaves:
                given = homes.parameters.get(parameter)
                leaves[parameter] = (
                    torch.empty_like(self.matrices[name].weight) if given is None else given.detach()
                ).requires_grad_()
        return leaves, views

    @torch.no_grad()
    def _write(self) -> None:
        """Puts the values of all weights, as they are now, where the block reads them."""
        for name, (parameter, part) in self.views.items():
            self.matrices[name].values(self.parameters[parameter][part])

    def _squares(self, rows: Tensor) -> Tensor:
        """Sum of squared errors of the output, float32."""
        output = self.run(dict(self.parameters), self.inputs.pick(rows).to(self.device, self.dtype))
        return (output.to(torch.float32) - self.targets.pick(rows).to(self.device, torch.float32)).square().sum()

    def _rows_that_fit(self) -> int:
        """Rows whose activations stay within the limit; at least 1. Measured: what two rows make autograd keep, less what one does."""
        most = min(self.options.batch, self.rows)
        if self.options.activation_limit is None:
            return most
        self._write()
        one, two = (self._kept_bytes(rows) for rows in (1, min(2, self.rows)))
        # What does not grow with the rows are weights that the block holds itself.
        self.bytes_per_row = max(1, two - one if self.rows > 1 else one)
        return max(1, min(most, self.options.activation_limit // self.bytes_per_row))

    def _kept_bytes(self, rows: int) -> int:
        """Bytes that autograd keeps for the backward pass of so many rows, weights not counted."""
        kept: dict[int, int] = {}
        own = {leaf.untyped_storage().data_ptr() for leaf in self.parameters.values()}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self._squares(torch.arange(rows))
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
