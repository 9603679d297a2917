"""What lies between the two halves of a decoder layer, kept so that the first half need not be run again.

    x  ->  middle = x + mixer(norm(x))  ->  middle + mlp(norm(middle))

While the weights of an MLP are chosen one after the other, the calibration rows go through their layer several times, and the mixer makes the same of them each
time: in a Gated DeltaNet that is most of the work. So the first pass behind the last change of the mixer puts `middle` down, in the numbers that the layer
computes in, and later passes begin there. Nothing is approximated: the second half is handed what it would have been handed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn

from qwench.models.map import Slot
from qwench.stream.hidden import output_errors

FIRST_HALF = ("norm.input", "attention.", "delta.")
"""Roles, or what they begin with, of the weights that `middle` depends on."""


class Middle:
    """The middles of rows, in a file without a name.

    Args:
        folder: where the file lies.
        shape: rows, length, width.
        dtype: that the layer computes in.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self._known = torch.zeros(shape[0], dtype=torch.bool)
        with output_errors(folder):
            self._file = TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def put(self, rows: Tensor, middle_BTD: Tensor) -> None:
        """Keep those of some rows. Raises OutputError where the disk is full."""
        stored = middle_BTD.detach().to("cpu", self.dtype).contiguous()
        with output_errors(self.folder):
            for row, values in zip(rows.tolist(), stored, strict=True):
                self._file.seek(row * self.row_bytes)
                left = memoryview(values.view(torch.uint8).numpy().data).cast("B")
                while left:
                    left = left[self._file.write(left) :]
        self._known[rows] = True

    def pick(self, rows: Tensor) -> Tensor | None:
        """Those of some rows [B, T, D], in the order asked for; None where one of them is not known."""
        if not bool(self._known[rows].all()):
            return None
        flat = torch.empty(len(rows) * self.row_bytes, dtype=torch.uint8)
        view = memoryview(flat.numpy().data)
        for place, row in enumerate(rows.tolist()):
            self._file.seek(row * self.row_bytes)
            at, end = place * self.row_bytes, (place + 1) * self.row_bytes
            while at < end:
                moved = self._file.readinto(view[at:end])
                assert moved, "the row was written whole"
                at += moved
        return flat.view(self.dtype).view(len(rows), *self.shape[1:])

    def forget(self) -> None:
        """The mixer has changed: nothing is known any more."""
        self._known[:] = False

    def close(self) -> None:
        self._file.close()


class SecondHalf(nn.Module):
    """A decoder layer from its middle on, its parameters behind `layer.`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, middle_BTD: Tensor) -> Tensor:
        layer: Any = self.layer
        result = layer.mlp(layer.post_attention_layernorm(middle_BTD))
        hidden: Tensor = middle_BTD + (result[0] if isinstance(result, tuple) else result)
        return hidden


def in_first_half(slot: Slot) -> bool:
    """Whether the middle depends on a weight."""
    return slot.role.startswith(FIRST_HALF)


def watched(layer: nn.Module) -> bool:
    """Whether somebody looks at what the first half of a layer does: then it has to be run."""
    halves = [module for name, module in layer.named_children() if name in ("input_layernorm", "self_attn", "linear_attn")]
    return any(module._forward_pre_hooks or module._forward_hooks for half in halves for module in half.modules())


@contextmanager
def seeing_middle(layer: nn.Module, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """While it lasts, the middle of every pass is given to `keep`."""
    norm = layer.get_submodule("post_attention_layernorm")
    handle = norm.register_forward_pre_hook(lambda _module, read: keep(read[0]))
    try:
        yield
    finally:
        handle.remove()
