"""A checkpoint that is put together from others without being written: tensors of theirs under names of its own, with a config of its own.

    grafted = View(trunk.folder, config, {**of(trunk), **of(donor, heads)})       # the trunk's tensors and the donor's head
    text = View(source.folder, text_config, {"model.norm.weight": Place(source, "model.language_model.norm.weight"), ...})

Nothing is copied and nothing is read before somebody asks for it. Views can be stacked, and everything that reads a checkpoint reads a view: plans, walks, writers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qwench.checkpoint.parts import joined, part_shape
from qwench.checkpoint.source import Part, StoredSource, TensorEntry
from qwench.errors import CheckpointError


@dataclass(frozen=True)
class Place:
    """Where a tensor of a view is: in which source, what it is called there, and which part of that tensor it is."""

    source: StoredSource
    name: str
    part: Part = ()

    def within(self, part: Part) -> Part:
        """A part of this tensor as a part of the stored one."""
        return joined(self.source.tensors[self.name].shape, self.part, part)


class View:
    """Tensors of other sources; see `StoredSource`.

    Attributes:
        folder: where the files beside the tensors lie (tokenizer, licence): that of the leading source.
        config: the view's own `config.json`.
        tensors: every tensor under the name that the view gives it. Its `file` is relative to `folder`, or the whole path where it lies elsewhere.
        places: where each of them comes from.
        notes: those of the sources, and what was said of the view itself.
    """

    def __init__(self, folder: Path, config: dict[str, Any], places: Mapping[str, Place], notes: Sequence[str] = ()) -> None:
        self.folder, self.config, self.places = folder, config, dict(places)
        self.tensors: Mapping[str, TensorEntry] = {name: self._entry(name, place) for name, place in self.places.items()}
        self.notes: Sequence[str] = list(dict.fromkeys([*(n for s in self.sources for n in s.notes), *notes]))

    @property
    def sources(self) -> tuple[StoredSource, ...]:
        """Each source once, in the order in which they occur."""
        return tuple({id(place.source): place.source for place in self.places.values()}.values())

    def read(self, name: str, part: Part = ()) -> Tensor:
        """As `TensorSource.read`."""
        place = self._place(name)
        return place.source.read(place.name, place.within(part))

    def chunks(self, name: str, part: Part = ()) -> Iterator[memoryview]:
        """As `StoredSource.chunks`."""
        place = self._place(name)
        return place.source.chunks(place.name, place.within(part))

    def stamp(self) -> str:
        """A digest of the sources' stamps, the config, and which tensor comes from where."""
        table = [(name, self.sources.index(place.source), place.name, place.part) for name, place in self.places.items()]
        stamps = [source.stamp() for source in self.sources]
        return hashlib.sha256(repr((stamps, self.config, table)).encode()).hexdigest()

    def _place(self, name: str) -> Place:
        if name not in self.places:
            raise CheckpointError(f"{self.folder} holds no tensor {name}", "see `qwench inspect` for what it holds")
        return self.places[name]

    def _entry(self, name: str, place: Place) -> TensorEntry:
        entry = place.source.tensors[place.name]
        elsewhere = bool(entry.file) and place.source.folder != self.folder
        shape = part_shape(entry.shape, place.part)
        return replace(
            entry, name=name, shape=shape, file=str(place.source.folder.resolve() / entry.file) if elsewhere else entry.file
        )


def of(source: StoredSource, names: Iterable[str] | None = None) -> dict[str, Place]:
    """The places of some tensors of a source, or of all, under their own names."""
    return {name: Place(source, name) for name in (source.tensors if names is None else names)}
