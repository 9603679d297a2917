"""What a person sees: tables, byte sizes, progress. A live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from qwench.machine import peak_rss
from qwench.result import Acceptance, Estimate, Evaluation, Figures, Speculation, Verification

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


class Report:
    """What long work calls: how much is done, of how much, and what it is at. A live bar on a terminal, a line every ten seconds elsewhere.

    Args:
        label: what the work is, for a person.
        unit: what is counted: `bytes`, `blocks` ...
        bar: the live bar, or None.
    """

    INTERVAL = 10.0

    def __init__(self, label: str, unit: str, bar: Progress | None) -> None:
        self.label, self.unit, self.bar = label, unit, bar
        self.last = time.monotonic()
        self.since: tuple[float, int] | None = None
        self.at = 0
        self.task = bar.add_task(label, total=None, memory="") if bar else None

    def __call__(self, done: int, total: int, what: str) -> None:
        since, began = self._begun(done, total)
        if self.bar and self.task is not None:
            memory = f"peak {size(peak_rss())}"
            self.bar.update(self.task, completed=done, total=total, description=f"{self.label} {what}", memory=memory)
            return
        now = time.monotonic()
        if now - self.last < self.INTERVAL:
            return
        self.last = now
        left = f"{(now - since) * (total - done) / (done - began):.0f} s left, " if done > began else ""
        amount = f"{size(done)} of {size(total)}" if self.unit == "bytes" else f"{done} of {total} {self.unit}"
        err.print(f"{self.label} {what}: {amount}, {left}peak memory {size(peak_rss())}")

    def _begun(self, done: int, total: int) -> tuple[float, int]:
        """When this piece of work began, and at what: what an earlier run or another piece had done is nothing to reckon the time left from."""
        if self.since is None or done < self.at:
            self.since = time.monotonic(), done
            if self.bar and self.task is not None:
                self.bar.reset(self.task, completed=done, total=total)
        self.at = done
        return self.since

    def note(self, text: str) -> None:
        """Something that a person should know and need not act on."""
        (self.bar.console if self.bar else err).print(f"note: {escape(text)}")


@contextmanager
def progress(label: str, unit: str = "bytes") -> Iterator[Report]:
    """Progress of one long piece of work."""
    if not err.is_terminal:
        yield Report(label, unit, None)
        return
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn()]
    columns += (
        [DownloadColumn(), TransferSpeedColumn()]
        if unit == "bytes"
        else [TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit)]
    )
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[memory]}"), console=err, transient=True) as bar:
        yield Report(label, unit, bar)


def show_verification(found: Verification) -> None:
    """What an engine did with a release."""
    rows: list[tuple[str, Any]] = [
        ("outcome", found.outcome),
        ("tensors consumed", found.consumed),
        ("not consumed", len(found.unconsumed)),
        ("left uninitialized", len(found.uninitialized)),
    ]
    if found.mean_kl is not None:
        rows.append(("mean KL to our reading", f"{found.mean_kl:.2e} nats (tolerance {found.tolerance_kl:.0e})"))
    if found.max_abs_logprob is not None:
        rows.append(
            ("largest |difference| of log-probabilities", f"{found.max_abs_logprob:.3f} over {found.positions} positions")
        )
    if found.generated is not None:
        rows.append(("generated", escape(repr(found.generated[:60]))))
    if found.image is not None:
        rows.append(("image", found.image))
    for name, value in (found.speculation or {}).items():
        rows.append((f"speculation: {name}", f"{value:.3g}"))
    if found.original_kl is not None:
        limit = found.original_tolerance_kl
        rows.insert(5, ("mean KL from transformers on the source", f"{found.original_kl:.2e} nats (tolerance {limit:.0e})"))
    title = f"{found.engine} {found.version}" + (f", {found.file}" if found.file else "")
    out.print(table(title, ["what", "found"], rows))
    for note in found.notes:
        out.print(f"note: {escape(note)}")


def show_ladder(measured: Mapping[str, Evaluation]) -> None:
    """Files of a release against its source, one row each."""

    def first(side: Acceptance | None) -> str | None:
        return f"{side.by_position[0].mean:.3f}" if side and side.by_position else None

    rows = [
        (
            name, f"{e.divergence.mean.mean:.3g} ± {e.divergence.mean.standard_error:.2g}", f"{e.divergence.p999:.3g}",
            f"{e.top1_agreement.mean:.2%}", f"{e.perplexity_release.mean:.3f}", first(e.acceptance_source), first(e.acceptance_release),
        )
        for name, e in measured.items()
    ]  # fmt: skip
    title = "; ".join(dict.fromkeys(f"{e.tokens:,} tokens of {e.text}" for e in measured.values()))
    columns = ["file", "KL(source || file)", "p99.9", "top-1", "perplexity", "acceptance, source", "acceptance"]
    out.print(table(f"Measured on {title}", columns, rows))


def show_evaluation(measured: Evaluation) -> None:
    """A release against its source."""

    def both(estimate: Estimate, digits: str = ".4f") -> str:
        return f"{estimate.mean:{digits}} ± {estimate.standard_error:{digits}}"

    without = measured.without_corrections
    found: list[Figures] = [measured, *([without] if without else [])]
    tails = [(side.divergence.p99, side.divergence.p999, side.divergence.max) for side in found]
    rows: list[tuple[str, ...]] = [
        ("KL(source || release), mean", "", *(both(side.divergence.mean, ".5f") for side in found)),
        ("KL p99 / p99.9 / max", "", *(" / ".join(f"{value:.3f}" for value in tail) for tail in tails)),
        ("perplexity", both(measured.perplexity_source, ".3f"), *(both(side.perplexity_release, ".3f") for side in found)),
        ("top-1 agreement", "", *(both(side.top1_agreement) for side in found)),
    ]
    heads = [measured.acceptance_source, *(side.acceptance_release for side in found)]
    drafts = [head.by_position if head else [] for head in heads]
    for position in range(max(map(len, drafts))):
        cells = (both(side[position], ".3f") if position < len(side) else "-" for side in drafts)
        rows.append((f"MTP acceptance at position {position + 1}", *cells))
    rows += _speculation_rows([measured.speculation_source, *(side.speculation_release for side in found)])
    columns = ["", "source", *(["with corrections", "without"] if without else ["release"])]
    out.print(table(f"Measured on {measured.tokens:,} tokens of {measured.text}", columns, rows))


def _speculation_rows(sides: Sequence[Speculation | None]) -> list[tuple[str, ...]]:
    """Free-running speculation, side by side; nothing where none was measured."""
    drafts = max((side.drafts for side in sides if side), default=0)
    if not drafts:
        return []

    def line(what: str, text: Callable[[Speculation], str]) -> tuple[str, ...]:
        return what, *(text(side) if side else "-" for side in sides)

    def accepted_at(place: int) -> Callable[[Speculation], str]:
        return lambda s: f"{s.by_position[place].mean:.3f} ± {s.by_position[place].standard_error:.3f}"

    return [
        line(f"writing with {drafts} drafts: accepted / drafted", lambda s: f"{s.accepted:,} / {s.drafted:,}"),
        *(line(f"writing: accepted at position {place + 1}", accepted_at(place)) for place in range(drafts)),
        line("writing: tokens per forward", lambda s: f"{s.mean_length.mean:.3f} ± {s.mean_length.standard_error:.3f}"),
        line("writing: expected speedup", lambda s: f"{s.speedup:.2f}" if s.steady else f"{s.speedup:.1f} (busy machine)"),
    ]
