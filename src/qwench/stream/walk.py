"""The one loop: through the decoder layer by layer, each read once, observed, changed, written, and forgotten.

    embed the rows
    for each layer:   read it -> every change in turn observes its inputs and changes it -> the rows go through it, observers look on -> it is emitted -> it is dropped
    the MTP head, where it is asked for, is one more layer, which reads pairs of hidden state and next token (see `head`)

The next layer sees what the changed layer puts out (`onward: changed`), so that errors do not pile up unseen, or what the original would (`onward: original`). A change that
compares against the original network asks for both streams. After each layer the state is whole on disk (see `hidden`), so that a stopped walk goes on from there and
ends with the same bytes: nothing in the loop depends on what came before but the files.

A row that a layer makes infinite or NaN would spoil every sum that it enters, in that very layer already. So such a layer is read again and done without the
row; the row stays out from there on, and the record says where.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from qwench.checkpoint.source import TensorSource
from qwench.errors import CheckpointError
from qwench.models.map import ModelMap
from qwench.models.place import CPU, Place
from qwench.models.run import Trunk
from qwench.stream.head import HeadStates, LiveHead, head_block
from qwench.stream.hidden import Hidden, HiddenFiles, Lost, States
from qwench.stream.images import Pictures
from qwench.stream.live import Batch, LiveBlock
from qwench.stream.middle import Middle
from qwench.stream.observe import Reach, Take, taking_inputs
from qwench.stream.row_inputs import RowInputs

MOST_LOST_ROWS = 0.1
"""Share of rows that may turn non-finite before a walk stops."""


class Change(Protocol):
    """What a calibrated step does to a layer. It may be asked twice for the same layer, the second time with fewer rows.

    Attributes:
        name: for progress and reports.
        needs_original: whether it compares against the original network's hidden states.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_original(self) -> bool: ...

    def __call__(self, live: LiveBlock, rows: Rows, /) -> None: ...


@runtime_checkable
class Onlooker(Protocol):
    """A change that looks on while the original rows go through the original layer, before it is asked to change it: that pass is made anyway."""

    def watching(self, live: LiveBlock, /) -> AbstractContextManager[None]:
        """What lasts while they do. Of a layer that is done again, it counts from the start."""
        ...


class Observer(Protocol):
    """What looks on while the rows go through a finished layer, and changes nothing."""

    def takers(self, live: LiveBlock, /) -> dict[str, Take]:
        """What is to be given the inputs [N, I] of which input sets. Asked for each layer; for one that is done again too, and then all sums start again."""


@dataclass
class Rows:
    """The calibration rows before a layer, as a change sees them.

    Attributes:
        changed: hidden states that the changed network puts out.
        original: those of the original network; None where no change asked for them.
        targets: what the original layer makes of `original`; None likewise.
        batch: rows to take at once.
        sound: rows whose hidden states are finite.
        scratch: a folder for what a change cannot hold in memory; what it leaves there goes with the walk.
        positions: where tokens of some rows stand, int64 [3, rows, length]; None: 0, 1, 2 ... as in text.
        reach: which tokens the statistics of an expert are to be gathered on.
    """

    changed: States
    original: States | None
    targets: States | None
    batch: int
    sound: Tensor
    scratch: Path
    positions: Callable[[Tensor], Tensor | None] = lambda rows: None
    reach: Reach = "routed"

    def batches(self) -> Iterator[Batch]:
        """Sound rows of the stream that goes onward."""
        indices = self.sound.nonzero().flatten()
        for part in torch.split(indices, self.batch):
            yield self.pick(part)

    def pick(self, rows: Tensor) -> Batch:
        """Some rows of the stream that goes onward, by number, in the order asked for."""
        return Batch(self.changed.pick(rows), self.positions(rows), rows)


@dataclass
class Walk:
    """A walk's settings and what it found out.

    Attributes:
        changes: what is done to each layer, in order.
        observers: what looks on afterwards.
        mtp: go on into the MTP head.
        onward: which outputs the next layer sees.
        batch: rows that go through a layer at once.
        place: where layers run, and in which numbers.
        reach: which tokens changes gather the statistics of an expert on.
        lost: rows that turned non-finite: (layer that made them so, row); the MTP head counts as the layer behind the last.
    """

    changes: Sequence[Change] = ()
    observers: Sequence[Observer] = ()
    mtp: bool = False
    onward: Literal["changed", "original"] = "changed"
    batch: int = 4
    place: Place = CPU
    reach: Reach = "routed"
    lost: Lost = field(default_factory=list)

    @property
    def streams(self) -> tuple[str, ...]:
        both = self.onward == "changed" and any(change.needs_original for change in self.changes)
        return ("changed", "original") if both else (self.onward,)


Emit = Callable[[LiveBlock], None]
Tell = Callable[[int, int, str], None]


def walk(
    settings: Walk, source: TensorSource, map: ModelMap, ids_NT: Tensor, files: HiddenFiles, emit: Emit, tell: Tell,
    pictures: Pictures | None = None,
) -> None:  # fmt: skip
    """Take calibration rows through a network and change it on the way.

    Args:
        ids_NT: token ids, int64 [rows, length].
        files: where the state lies; a state that is there already is gone on from. Its `depth` is the trunk's where the walk goes on into the MTP head.
        emit: called with each changed layer, once it is final; must have put it down when it returns.
        tell: progress: (layers done, layers, what).
        pictures: images in the rows.

    Raises:
        CheckpointError: from the source; no MTP head to go into; or more than a tenth of the rows turned non-finite.
        OutputError: from the disk.
    """
    if settings.mtp:
        head_block(source, map)
        assert files.depth == len(map.blocks) and ids_NT.shape[1] > 1
    trunk = Trunk(source, map, settings.place.dtype, settings.place.device)
    _Loop(settings, RowInputs(trunk, ids_NT, pictures, files.folder), files, emit, tell).run()


@dataclass
class _Loop:
    settings: Walk
    inputs: RowInputs
    files: HiddenFiles
    emit: Emit
    tell: Tell
    pace: str = ""

    def run(self) -> None:
        first = self._begin()
        started = time.monotonic()
        for index in range(first, self.layers):
            pace = self.ids.numel() * (index - first) / (time.monotonic() - started)
            self.pace = f", {pace:,.0f} tokens/s" if index > first else ""
            self._layer(index)
            if index < self.depth:
                self.files.forget([index])
        self.tell(self.layers, self.layers, "all layers done")

    @property
    def trunk(self) -> Trunk:
        return self.inputs.trunk

    @property
    def ids(self) -> Tensor:
        return self.inputs.ids

    def _say(self, index: int, what: str) -> None:
        self.tell(index, self.layers, f"{self._name(index)} ({index + 1} of {self.layers}): {what}{self.pace}")

    @property
    def depth(self) -> int:
        return len(self.trunk.map.blocks)

    @property
    def layers(self) -> int:
        return self.depth + self.settings.mtp

    def _begin(self) -> int:
        """Embed the rows, or find out where an earlier walk stood, and which rows it had left out."""
        first = self.files.latest(self.settings.streams)
        self.settings.lost[:] = [] if first is None else [(layer, row) for layer, row in self.files.lost() if layer < first]
        self.sound = torch.ones(len(self.ids), dtype=torch.bool)
        if first is None:
            first = 0
            for stream in self.settings.streams:
                parts = torch.split(torch.arange(len(self.ids)), self.settings.batch)
                self.files.put(stream, 0, (self.inputs.embed(part) for part in parts))
        self.files.forget(range(first))
        self.sound[[row for _, row in self.settings.lost]] = False
        for stream in self.settings.streams:
            states = self.files.before(stream, first)
            self._lose(first, [row for row in range(len(self.ids)) if not bool(states.read(row, row + 1).isfinite().all())])
        return first

    def _layer(self, index: int) -> None:
        """One layer: changed, run, put down. Where it makes rows non-finite, again without them."""
        written = self._attempt(index)
        while written is None:
            self._say(index, "again, without the rows that it made non-finite")
            written = self._attempt(index)
        for stream in written:
            self.files.publish(stream, index + 1)

    def _attempt(self, index: int) -> dict[str, Hidden] | None:
        with closing(self._live(index)) as live:
            return self._changed(index, live)

    def _changed(self, index: int, live: LiveBlock) -> dict[str, Hidden] | None:
        written: dict[str, Hidden] = {}
        if "original" in self.settings.streams:
            lookers = self.settings.observers if self.settings.onward == "original" else ()
            onlookers = [change for change in self.settings.changes if isinstance(change, Onlooker)]
            with ExitStack() as stack:
                for onlooker in onlookers:
                    stack.enter_context(onlooker.watching(live))
                written["original"], lost = self._through(live, "original", index, lookers)
            if self._lose(index, lost) and (lookers or onlookers):
                return None
        rows = self._rows(index, written.get("original"))
        for change in self.settings.changes:
            self._say(index, change.name)
            change(live, rows)
        if "changed" in self.settings.streams:
            self._say(index, "going through")
            written["changed"], lost = self._through(live, "changed", index, self.settings.observers)
            if self._lose(index, lost):
                return None
        self.emit(live)
        self.files.remember(self.settings.lost)
        return written

    def _live(self, index: int) -> LiveBlock:
        trunk, place = self.trunk, self.settings.place
        if index == self.depth:
            return LiveHead(trunk.source, trunk.map, trunk.modules, place)
        live = LiveBlock(trunk.source, trunk.map, trunk.modules, index, place)
        if self.settings.changes:
            live.middle = Middle(self.files.folder, self.files.shape, place.dtype)
        return live

    def _name(self, index: int) -> str:
        return "the MTP head" if index == self.depth else f"layer {index}"

    def _states(self, stream: str, index: int) -> States:
        hidden = self.files.before(stream, index)
        return HeadStates(hidden, self.inputs) if index == self.depth else hidden

    def _rows(self, index: int, targets: Hidden | None) -> Rows:
        streams, both = self.settings.streams, "original" in self.settings.streams
        original = self._states("original", index) if both else None
        return Rows(
            self._states(streams[0], index), original, targets, self.settings.batch, self.sound.clone(), self.files.folder,
            lambda rows: self._positions(index, rows), self.settings.reach,
        )  # fmt: skip

    def _positions(self, index: int, rows: Tensor) -> Tensor | None:
        """Where the tokens of some rows stand, as a layer sees them: the MTP head's last is the one before the last."""
        positions = self.inputs.positions(rows)
        return positions if positions is None or index < self.depth else positions[..., :-1]

    def _through(self, live: LiveBlock, stream: str, index: int, observers: Sequence[Observer]) -> tuple[Hidden, list[int]]:
        """Take the sound rows through a layer, and find those that it makes non-finite; rows that are out already are NaN."""
        states, shape = self._states(stream, index), self.files.before(stream, index + 1).shape
        onward = stream == "changed"
        lost: list[int] = []

        def outputs() -> Iterator[Tensor]:
            for rows in torch.split(torch.arange(shape[0]), self.settings.batch):
                result = torch.full((len(rows), *shape[1:]), float("nan"), dtype=self.files.dtype)
                sound = self.sound[rows]
                if sound.any():
                    kept = rows[sound]
                    read = Batch(states.pick(kept), self._positions(index, kept), kept if onward else None)
                    result[sound] = live.run(read).to("cpu", self.files.dtype)
                lost.extend(rows[sound & ~result.isfinite().flatten(1).all(1)].tolist())
                yield result

        with ExitStack() as stack:
            for observer in observers:
                stack.enter_context(taking_inputs(live, observer.takers(live)))
            return self.files.write(stream, index + 1, outputs()), lost

    def _lose(self, index: int, rows: Sequence[int]) -> bool:
        """Leave rows out from here on, openly; whether there were any. Too many of them stop the walk."""
        fresh = [row for row in rows if self.sound[row]]
        self.sound[fresh] = False
        self.settings.lost.extend((index, row) for row in fresh)
        count = int((~self.sound).sum())
        if count > MOST_LOST_ROWS * len(self.sound):
            at, row = self.settings.lost[0]
            raise CheckpointError(
                f"{count} of {len(self.sound)} calibration rows are not finite after {self._name(index)}; the first was row {row} in {self._name(at)}",
                "the checkpoint overflows: check its dtype and source, or calibrate on other text",
            )
        return bool(fresh)
