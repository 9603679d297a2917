"""Hidden states of the calibration rows between two layers, on disk.

They are what a walk must keep from layer to layer: 128 rows of 2,048 tokens of a 9B model are 2 GB in bfloat16. They live in a plain file that is read and written a
few rows at a time; what is read twice comes from the page cache where there is room, and the process holds only the rows at hand. The file of the next layer is
written beside the present one and takes its name when it is whole: what a killed run leaves is always the whole state before some layer.

Rows that turn non-finite on the way are left out from there on. What was left out, and in which layer, lies beside the states.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qwench.errors import OutputError

NAME = re.compile(r"(?P<stream>[a-z]+)-(?P<layer>\d+)\.bin")
LOST = "lost.json"

Lost = list[tuple[int, int]]
"""Rows that were left out: (layer that made them non-finite, row)."""


class States(Protocol):
    """What a layer reads of each row: hidden states from a file, or made of them when they are asked for."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, length, width."""

    @property
    def dtype(self) -> torch.dtype:
        """What `read` and `pick` answer in."""

    def read(self, first: int, last: int) -> Tensor:
        """Rows first..last-1: [n, length, width]."""

    def pick(self, rows: Tensor) -> Tensor:
        """Some rows [n, length, width], in the order asked for."""


@dataclass(frozen=True)
class Hidden:
    """The hidden states [rows, length, width] before one layer.

    Attributes:
        path: the file.
        shape: rows, length, width.
        dtype: stored in; bfloat16 as the model itself would pass them on, or float32.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def read(self, first: int, last: int) -> Tensor:
        """Rows first..last-1, in the stored dtype. Raises OutputError where the file is shorter than it should be."""
        flat = torch.empty((last - first) * self.row_bytes, dtype=torch.uint8)
        with self.path.open("rb") as stream:
            stream.seek(first * self.row_bytes)
            if stream.readinto(memoryview(flat.numpy().data)) != len(flat):
                raise OutputError(
                    f"{self.path} is shorter than {self.shape} in {self.dtype}", "remove the unfinished folder and start again"
                )
        return flat.view(self.dtype).view(last - first, *self.shape[1:])

    def pick(self, rows: Tensor) -> Tensor:
        """Some rows [n, length, width], in the order asked for."""
        return torch.cat([self.read(int(row), int(row) + 1) for row in rows])


class HiddenFiles:
    """The streams of a walk: `changed` rows see the changed layers, `original` rows the untouched ones.

    Args:
        folder: where the files lie.
        shape: rows, length, width.
        dtype: see `Hidden`.
        depth: where the walk goes on into the MTP head: the trunk's layers. Behind the head, rows are one position shorter. None: it does not.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype, depth: int | None = None) -> None:
        self.folder, self.shape, self.dtype, self.depth = folder, shape, dtype, depth
        folder.mkdir(parents=True, exist_ok=True)

    def before(self, stream: str, layer: int) -> Hidden:
        """The hidden states before a layer."""
        rows, length, width = self.shape
        behind_head = self.depth is not None and layer > self.depth
        return Hidden(self.folder / f"{stream}-{layer}.bin", (rows, length - behind_head, width), self.dtype)

    def latest(self, streams: tuple[str, ...]) -> int | None:
        """The last layer before which all streams are whole, or None."""
        layers = []
        for stream in streams:
            found = [int(m["layer"]) for p in self.folder.iterdir() if (m := NAME.fullmatch(p.name)) and m["stream"] == stream]
            whole = [h for layer in found if (h := self.before(stream, layer)).path.stat().st_size == h.nbytes]
            layers.append({int(h.path.stem.rpartition("-")[2]) for h in whole})
        common = set.intersection(*layers) if layers else set()
        return max(common, default=None)

    def write(self, stream: str, layer: int, batches: Iterable[Tensor]) -> Hidden:
        """Write the hidden states before a layer, which nobody takes for whole until they are published. Raises OutputError where the disk is full."""
        final = self.before(stream, layer)
        beside = Hidden(final.path.with_suffix(".new"), final.shape, final.dtype)
        with output_errors(beside.path), beside.path.open("wb") as sink:
            for batch in batches:
                sink.write(batch.to(self.dtype).contiguous().view(torch.uint8).numpy().data)
            sink.flush()
            os.fsync(sink.fileno())
        assert beside.path.stat().st_size == beside.nbytes
        return beside

    def publish(self, stream: str, layer: int) -> None:
        """Give written states their name: from now on a walk goes on from here."""
        final = self.before(stream, layer).path
        final.with_suffix(".new").replace(final)

    def put(self, stream: str, layer: int, batches: Iterable[Tensor]) -> None:
        """Write and publish at once."""
        self.write(stream, layer, batches)
        self.publish(stream, layer)

    def forget(self, layers: Iterable[int]) -> None:
        """Remove the states before these layers, of all streams."""
        gone = set(layers)
        for path in self.folder.iterdir():
            if (match := NAME.fullmatch(path.name)) and int(match["layer"]) in gone:
                path.unlink()

    def remember(self, lost: Lost) -> None:
        """Put down which rows were left out; before the states without them are published."""
        beside = self.folder / f"{LOST}.new"
        with output_errors(beside):
            beside.write_text(json.dumps(lost), encoding="utf-8")
            beside.replace(self.folder / LOST)

    def lost(self) -> Lost:
        """What an earlier run put down."""
        path = self.folder / LOST
        return [(int(layer), int(row)) for layer, row in json.loads(path.read_text("utf-8"))] if path.exists() else []


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Say what a failing disk means."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}", "free some space and run the same command again"
        ) from error
