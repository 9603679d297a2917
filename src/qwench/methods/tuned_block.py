"""A block whose weights are tuned by signed gradient descent (`qwench.methods.autoround`): one step, one judgement, and the memory that they take.

Before the block runs, the values of all weights are written into the parameters that it reads; the gradient of the parameters is then carried on to what is
tuned about each weight, one matrix at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from qwench.methods.tuned_matrix import TunedMatrix

Run = Callable[[dict[str, Tensor], Any], Tensor]
"""The block: values of the tuned weights by parameter, and some rows of inputs -> its output. It holds all other parameters itself."""


class Rows(Protocol):
    """Rows [rows, ...] that lie somewhere and are read when they are needed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def pick(self, rows: Tensor, /) -> Any:
        """Some of them by number, in the order asked for: a tensor; inputs may also be what the block takes and has a tensor's `to(device, dtype)`."""


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
        judge_from: share of the steps before which nothing but the start is judged: as long as steps are large, those that follow are nearly always better.
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
    judge_from: float = 0.0
    judge_rows: int | None = 32
    activation_limit: int | None = None
    scale_dtype: torch.dtype = torch.bfloat16


class TunedBlock:
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
        wanted: Tensor = self.targets.pick(rows).to(self.device, torch.float32)
        return (output.to(torch.float32) - wanted).square().sum()

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
            # Not the tensor itself: a node that keeps its own output would hold itself for ever.
            return tensor.detach()

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self._squares(torch.arange(rows))
        return sum(kept.values())
