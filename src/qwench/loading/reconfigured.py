"""A checkpoint under another config: what would come of its tensors if config.json said something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from qwench.checkpoint.source import Part, StoredSource


class Reconfigured:
    """A source under another config; see `StoredSource`."""

    def __init__(self, source: StoredSource, config: dict[str, Any]) -> None:
        self.source, self.config = source, config
        self.folder, self.tensors, self.notes = source.folder, source.tensors, source.notes

    def read(self, name: str, part: Part = ()) -> Tensor:
        return self.source.read(name, part)

    def chunks(self, name: str, part: Part = ()) -> Iterator[memoryview]:
        return self.source.chunks(name, part)

    def stamp(self) -> str:
        return self.source.stamp()
