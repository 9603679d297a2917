"""What a person sees: tables, byte sizes, progress. A live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def size(count: float) -> str:
    """Bytes for a person, decimal and binary where they differ enough to matter: `11.2 GB (10.4 GiB)`."""
    for unit, factor, binary, other in (("GB", 1e9, "GiB", 2**30), ("MB", 1e6, "MiB", 2**20), ("kB", 1e3, "KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.3g} {unit} ({count / other:.3g} {binary})"
    return f"{count:.0f} B"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table whose number columns stand to the right."""
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for position, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[position], int | float) for row in rows if row[position] is not None)
        made.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        made.add_row(*(_cell(value) for value in row))
    return made


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def peak_rss() -> int:
    """Largest resident size of this process so far, bytes."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class Report(Protocol):
    """What long work calls: how much is done, of how much, and what it is at."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


@contextmanager
def progress(label: str, unit: str = "bytes") -> Iterator[Report]:
    """Progress of one long piece of work: a live bar on a terminal, a line every ten seconds elsewhere."""
    if err.is_terminal:
        columns: list[Any] = [TextColumn("{task.description}"), BarColumn()]
        columns += [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit)]
        columns += [TimeRemainingColumn(), TextColumn("{task.fields[memory]}")]
        with Progress(*columns, console=err, transient=True) as bar:
            task = bar.add_task(label, total=None, memory="")

            def live(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, total=total, description=f"{label} {what}", memory=f"peak {size(peak_rss())}")

            yield live
        return
    started = last = time.monotonic()

    def plain(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 10 and done < total:
            return
        last = now
        left = (now - started) * (total - done) / max(1, done)
        amount = f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done}/{total} {unit}"
        err.print(f"{label} {what}: {amount}, {left:.0f} s left, peak memory {size(peak_rss())}")

    yield plain
