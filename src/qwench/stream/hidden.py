"""Hidden states of the calibration rows between two layers, on disk.

They are what a walk must keep from layer to layer: 128 rows of 2,048 tokens of a 9B model are 2 GB in bfloat16. They live in a plain file that is read and written a
few rows at a time; what is read twice comes from the page cache where there is room, and the process holds only the rows at hand. The file of the next layer is
written beside the present one and takes its name when it is whole: what a killed run leaves is always the whole state before some layer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwench.errors import OutputError

NAME = re.compile(r"(?P<stream>[a-z]+)-(?P<layer>\d+)\.bin")


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

    def batches(self, size: int) -> Iterator[Tensor]:
        """All rows, `size` at a time."""
        for first in range(0, self.shape[0], size):
            yield self.read(first, min(first + size, self.shape[0]))


class HiddenFiles:
    """The streams of a walk: `changed` rows see the changed layers, `original` rows the untouched ones.

    Args:
        folder: where the files lie.
        shape: rows, length, width.
        dtype: see `Hidden`.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        folder.mkdir(parents=True, exist_ok=True)

    def before(self, stream: str, layer: int) -> Hidden:
        """The hidden states before a layer."""
        return Hidden(self.folder / f"{stream}-{layer}.bin", self.shape, self.dtype)

    def latest(self, streams: tuple[str, ...]) -> int | None:
        """The last layer before which all streams are whole, or None."""
        layers = []
        for stream in streams:
            found = [int(m["layer"]) for p in self.folder.iterdir() if (m := NAME.fullmatch(p.name)) and m["stream"] == stream]
            whole = [layer for layer in found if self.before(stream, layer).path.stat().st_size == self._size]
            layers.append(set(whole))
        common = set.intersection(*layers) if layers else set()
        return max(common, default=None)

    def put(self, stream: str, layer: int, batches: Iterator[Tensor]) -> None:
        """Write the hidden states before a layer; they appear whole. Raises OutputError where the disk is full."""
        path = self.before(stream, layer).path
        beside = path.with_suffix(".new")
        try:
            with beside.open("wb") as sink:
                for batch in batches:
                    sink.write(batch.to(self.dtype).contiguous().view(torch.uint8).numpy().data)
                sink.flush()
                os.fsync(sink.fileno())
        except OSError as error:
            raise OutputError(
                f"{beside} cannot be written: {error.strerror}", "free some space and run the same command again"
            ) from error
        assert beside.stat().st_size == self._size
        beside.replace(path)

    def forget(self, layer: int) -> None:
        """Remove the states before a layer, of all streams."""
        for path in self.folder.iterdir():
            if (match := NAME.fullmatch(path.name)) and int(match["layer"]) == layer:
                path.unlink()

    @property
    def _size(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize
