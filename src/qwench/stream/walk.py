"""The one loop: through the decoder layer by layer, each read once, observed, changed, written, and forgotten.

    embed the rows
    for each layer:   read it -> every change in turn observes its inputs and changes it -> it is emitted -> the rows go through it -> it is dropped

The next layer sees what the changed layer puts out (`onward: changed`), so that errors do not pile up unseen, or what the original would (`onward: original`). A change that
compares against the original network asks for both streams. After each layer the state is whole on disk (see `hidden`), so that a stopped walk goes on from there and
ends with the same bytes: nothing in the loop depends on what came before but the files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from qwench.checkpoint.source import TensorSource
from qwench.errors import CheckpointError
from qwench.models.map import ModelMap
from qwench.models.run import Trunk
from qwench.stream.hidden import Hidden, HiddenFiles
from qwench.stream.live import LiveBlock

MOST_LOST_ROWS = 0.1
"""Share of rows that may turn non-finite before a walk stops."""


class Change(Protocol):
    """What a calibrated step does to a layer.

    Attributes:
        name: for progress and reports.
        needs_original: whether it compares against the original network's hidden states.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_original(self) -> bool: ...

    def __call__(self, live: LiveBlock, rows: Rows, /) -> None: ...


@dataclass
class Rows:
    """The calibration rows before a layer, as a change sees them.

    Attributes:
        changed: hidden states that the changed network puts out.
        original: those of the original network; None where no change asked for them.
        targets: what the original layer makes of `original`; None likewise.
        batch: rows to take at once.
        sound: rows whose hidden states are finite.
    """

    changed: Hidden
    original: Hidden | None
    targets: Hidden | None
    batch: int
    sound: Tensor

    def batches(self) -> Iterator[Tensor]:
        """Sound rows of the stream that goes onward."""
        indices = self.sound.nonzero().flatten()
        for part in torch.split(indices, self.batch):
            yield self.changed.pick(part)


@dataclass
class Walk:
    """A walk's settings and what it found out.

    Attributes:
        onward: which outputs the next layer sees.
        batch: rows that go through a layer at once.
        compute: dtype of the arithmetic; float32 is the faster one on processors without bfloat16 units.
        lost: rows that turned non-finite: (layer, row).
    """

    changes: Sequence[Change]
    onward: Literal["changed", "original"] = "changed"
    batch: int = 4
    compute: torch.dtype = torch.float32
    lost: list[tuple[int, int]] = field(default_factory=list)

    @property
    def streams(self) -> tuple[str, ...]:
        both = self.onward == "changed" and any(change.needs_original for change in self.changes)
        return ("changed", "original") if both else (self.onward,)


Emit = Callable[[LiveBlock], None]
Tell = Callable[[int, int, str], None]


def walk(
    settings: Walk, source: TensorSource, map: ModelMap, ids_NT: Tensor, files: HiddenFiles, emit: Emit, tell: Tell
) -> None:
    """Take calibration rows through a network and change it on the way.

    Args:
        ids_NT: token ids, int64 [rows, length].
        files: where the state lies; a state that is there already is gone on from.
        emit: called with each changed layer, once it is final; must have put it down when it returns.
        tell: progress: (layers done, layers, what).

    Raises:
        CheckpointError: from the source; or more than a tenth of the rows turned non-finite.
        OutputError: from the disk.
    """
    trunk = Trunk(source, map, settings.compute)
    first = files.latest(settings.streams)
    if first is None:
        first = 0
        for stream in settings.streams:
            files.put(stream, 0, (trunk.embed(part) for part in torch.split(ids_NT, settings.batch)))
    sound = torch.ones(len(ids_NT), dtype=torch.bool)
    started, tokens = time.monotonic(), 0
    for index in range(first, len(map.blocks)):
        live = LiveBlock(source, map, trunk.modules, index, settings.compute)
        rows = _rows(settings, files, index, sound)
        _look_for_lost_rows(settings, rows, index)
        if "original" in settings.streams:
            files.put("original", index + 1, _through(live, files.before("original", index), settings.batch))
        for change in settings.changes:
            tell(index, len(map.blocks), f"{change.name}, {tokens / max(1e-9, time.monotonic() - started):.0f} tokens/s")
            change(live, rows)
        emit(live)
        if "changed" in settings.streams:
            files.put("changed", index + 1, _through(live, files.before("changed", index), settings.batch))
        files.forget(index)
        tokens += ids_NT.numel()
        tell(index + 1, len(map.blocks), f"{tokens / (time.monotonic() - started):.0f} tokens/s")


def _rows(settings: Walk, files: HiddenFiles, index: int, sound: Tensor) -> Rows:
    original = targets = None
    if "original" in settings.streams:
        original, targets = files.before("original", index), files.before("original", index + 1)
    return Rows(files.before(settings.streams[0], index), original, targets, settings.batch, sound)


def _through(live: LiveBlock, hidden: Hidden, batch: int) -> Iterator[Tensor]:
    for part in hidden.batches(batch):
        yield live.run(part)


def _look_for_lost_rows(settings: Walk, rows: Rows, index: int) -> None:
    """Take rows with NaN or infinity out, openly; too many of them stop the walk."""
    for row in rows.sound.nonzero().flatten().tolist():
        if not bool(rows.changed.read(row, row + 1).isfinite().all()):
            rows.sound[row] = False
            settings.lost.append((index, row))
    lost = int((~rows.sound).sum())
    if lost > MOST_LOST_ROWS * len(rows.sound):
        layer, row = settings.lost[0]
        raise CheckpointError(
            f"{lost} of {len(rows.sound)} calibration rows are not finite before layer {index}; the first was row {row} before layer {layer}",
            "the checkpoint overflows: check its dtype and source, or calibrate on other text",
        )
