"""The pictures of a card, each from the record alone.

- `error_by_layer.png`: round-trip error of every quantized role in every layer, and below it what the hidden states, and what the head makes of them, have become at that depth.
- `divergence.png`: how the per-token divergence is distributed, and its tail.
- `bytes.png`: what each component takes in the source and in the release.
- `experts.png`: which experts stayed, by saliency, and how much of each layer's work.

Colours are blue and orange of the palette of Okabe and Ito, and shades of one blue: safe for colour-blind readers. A picture whose numbers were not measured is not
drawn, and an older one of the same name is removed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qwench.models.map import ROLES
from qwench.result import Divergence, Evaluation, Figures, PrecisionRow, Result, TensorError
from qwench.steps.cards.layers import costliest, divergences, hidden_errors, own_errors, sides
from qwench.steps.cards.pruning import pruning_figure

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#B8BDC4", "#30343A"
LINES: dict[str, Callable[[Figures], list[float]]] = {
    "Hidden states: difference from the source after each layer (%)": hidden_errors,
    "KL from the source after each layer, through norm and head (nats)": divergences,
}
LABELS = {"after": "release", "without": "without corrections"}
SHADES = LinearSegmentedColormap.from_list("shades", [(0.0, "#C5DDEC"), (0.5, "#4B95C1"), (1.0, "#08306B")])
STYLE: dict[str, Any] = {
    "font.size": 9.5, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#8A9099",
    "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "#E4E7EB", "grid.linewidth": 0.8,
    "legend.frameon": False, "figure.facecolor": "white",
}  # fmt: skip


def draw_plots(result: Result, folder: Path) -> dict[str, str]:
    """Draw what was measured into `folder`; returns file name -> caption, in the order in which a reader wants them."""
    captions = {}
    folder.mkdir(exist_ok=True)
    for name, (caption, draw) in PLOTS.items():
        with matplotlib.rc_context(STYLE):
            figure = draw(result)
            if figure is None:
                (folder / name).unlink(missing_ok=True)
                continue
            save_figure(figure, folder / name)
        captions[name] = caption
    return captions


def _divergence(result: Result) -> Figure | None:
    measured = result.evaluation.divergence if result.evaluation else None
    return divergence_figure(measured) if measured and measured.max > 0 and any(measured.histogram_counts) else None


def _layers(result: Result) -> Figure | None:
    found = result.evaluation
    return (
        layer_figure(result.errors, found) if (found and found.hidden_error_by_layer) or layer_table(result.errors)[0] else None
    )


def _bytes(result: Result) -> Figure | None:
    return bytes_figure(result.precision) if result.precision else None


def _experts(result: Result) -> Figure | None:
    return pruning_figure(result.pruning.layers) if result.pruning else None


PLOTS: dict[str, tuple[str, Callable[[Result], Figure | None]]] = {
    "divergence.png": ("Divergence from the source, token by token", _divergence),
    "error_by_layer.png": ("Error and KL by layer", _layers),
    "bytes.png": ("Bytes by component", _bytes),
    "experts.png": ("Experts that stayed and experts that went, by saliency", _experts),
}
"""File name -> caption, and what draws it where it was measured."""


def layer_figure(errors: Iterable[TensorError], evaluation: Evaluation | None) -> Figure:
    """Round-trip error as a map of role and layer; under it error and divergence after each layer as lines, on the same layers."""
    roles, table = layer_table(errors)
    shown = sides(evaluation) if evaluation else []
    lines = [(title, of) for title, of in LINES.items() if any(of(figures) for _, figures in shown)]
    layers = max([table.shape[1], *(len(of(figures)) for _, of in lines for _, figures in shown)])
    heights = [0.27 * len(roles) + 0.2] * bool(roles) + [1.7] * len(lines)
    figure = Figure(figsize=(7.6, sum(heights) + 1.25 + 0.45 * (len(heights) - 1)), layout="constrained")
    figure.set_layout_engine("constrained", hspace=0.06)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    if roles:
        _error_map(figure, axes[0], roles, table)
    for axis, (title, of) in zip(axes[bool(roles) :], lines, strict=True):
        own = own_errors(evaluation) if evaluation and of is hidden_errors else []
        _depth_lines(axis, title, [(name, of(figures)) for name, figures in shown if of(figures)], own)
    axes[-1].set_xlabel("decoder layer")
    axes[-1].set_xlim(-0.5, layers - 0.5)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 12)))
    return figure


def layer_table(errors: Iterable[TensorError]) -> tuple[list[str], Any]:
    """Roles, and [role, layer] relative round-trip error: the root mean square over the role's weights in that layer, NaN where none is quantized."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for error in errors:
        if error.layer is not None and not error.role.startswith("mtp."):
            found[error.role, error.layer].append(error.relative_rms)
    known = {role: place for place, role in enumerate(ROLES)}
    roles = sorted({role for role, _ in found}, key=lambda role: (known.get(role, len(known)), role))
    table = np.full((len(roles), 1 + max((layer for _, layer in found), default=-1)), np.nan)
    for (role, layer), values in found.items():
        table[roles.index(role), layer] = np.sqrt(np.mean(np.square(values)))
    return roles, table


def divergence_figure(divergence: Divergence) -> Figure:
    """The histogram on the left; on the right the share of tokens beyond a divergence, down to the last token."""
    edges, counts = np.array(divergence.histogram_edges), np.array(divergence.histogram_counts)
    used = np.flatnonzero(counts)
    low, high = max(used[0] - 1, 0), min(used[-1] + 2, len(counts))
    shares = counts / counts.sum()
    figure = Figure(figsize=(7.6, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    left.stairs(shares[low:high] * 100, edges[low : high + 1], fill=True, color=BLUE, alpha=0.85)
    left.set(title="Tokens by divergence", ylabel="share of tokens (%)", xscale="log", ylim=(0, shares.max() * 118))
    _mean_line(left, divergence.mean.mean)
    beyond = dict(
        zip(edges[low:high], shares[::-1].cumsum()[::-1][low:high] * 100, strict=True)
    )  # at the lower edge of each bin
    _tail(right, {x: share for x, share in beyond.items() if x < divergence.max}, divergence, 100 / counts.sum())
    for axis in (left, right):
        axis.set_xlabel("KL(source || release) per token (nats)")
        axis.minorticks_off()
        axis.grid(axis="y")
    return figure


def bytes_figure(precision: Iterable[PrecisionRow]) -> Figure:
    """One pair of bars for each component, the largest first; only the release's where the source's bytes were not counted."""
    rows = byte_rows(precision)
    whole = all(before is not None for _, before, _ in rows)
    unit, name = (1e9, "GB") if sum(after for *_, after in rows) >= 2e9 else (1e6, "MB")
    figure = Figure(figsize=(7.6, 0.46 * len(rows) + 1.1), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(rows))
    bars = []
    if whole:
        bars.append(axis.barh(places - 0.19, [(before or 0) / unit for _, before, _ in rows], 0.34, color=GREY, label="source"))
    bars.append(axis.barh(places + 0.19 * whole, [after / unit for *_, after in rows], 0.34, color=BLUE, label="release"))
    for bar in bars:
        axis.bar_label(bar, fmt=lambda value: size_text(value * unit), padding=3, fontsize=8.5)
    axis.set_yticks(places, [component for component, *_ in rows])
    axis.invert_yaxis()
    axis.set(title="Bytes by component", xlabel=f"size ({name})")
    axis.margins(x=0.1)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    if whole:
        axis.legend(loc="lower right")
    return figure


def byte_rows(precision: Iterable[PrecisionRow]) -> list[tuple[str, int | None, int]]:
    """(component, bytes in the source or None, bytes in the release), the largest first."""
    before: dict[str, int | None] = {}
    after: dict[str, int] = defaultdict(int)
    for row in precision:
        known = before.get(row.component, 0)
        before[row.component] = None if known is None or row.source_bytes is None else known + row.source_bytes
        after[row.component] += row.bytes
    rows = [(component, before[component], size) for component, size in after.items()]
    return sorted(rows, key=lambda row: -(row[1] or row[2]))


def size_text(size: float) -> str:
    """Bytes for a reader, decimal units, three digits: `11.2 GB`, `486 MB`, `0 B`."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= 0.9995 * u), (1.0, "B"))
    value = size / unit
    return f"{value:.{2 if value < 9.995 and unit > 1 else 1 if value < 99.95 and unit > 1 else 0}f} {name}"


def shade_range(values: Any) -> tuple[float, float]:
    """Ends of the colour scale: those of the values, but at least a fifth of the largest apart, so that equal errors look equal."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    widened = max(0.2 * high - (high - low), 0) / 2
    return low - widened, high + widened


def _error_map(figure: Figure, axis: Any, roles: list[str], table: Any) -> None:
    percent, (low, high) = table * 100, shade_range(table * 100)
    across, down = np.arange(table.shape[1] + 1) - 0.5, np.arange(len(roles) + 1) - 0.5
    image = axis.pcolormesh(across, down, percent, cmap=SHADES, vmin=low, vmax=high, edgecolors="white", linewidth=1.2)
    axis.set_facecolor("#F4F5F7")
    axis.set_yticks(range(len(roles)), roles)
    axis.invert_yaxis()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("Weights: relative round-trip error, rms (%); blank: not quantized")
    figure.colorbar(image, ax=axis, pad=0.015, fraction=0.04, aspect=12).outline.set_visible(False)


def _depth_lines(axis: Any, title: str, series: list[tuple[str, list[float]]], own: list[float]) -> None:
    """A measure after each layer; as bars what each layer adds by itself, the most of it in another colour."""
    most = costliest(own)
    others = [i for i in range(len(own)) if i != most]
    if others:
        axis.bar(others, [own[i] for i in others], width=0.5, color=GREY, label="the layer by itself")
    if most is not None:
        axis.bar([most], [own[most]], width=0.5, color=ORANGE, label="the most")
    for name, values in series:
        look: dict[str, Any] = {"color": BLUE} if name == "after" else {"color": GREEN, "linestyle": (0, (4, 2))}
        axis.plot(range(len(values)), values, marker="o", markersize=3.5, linewidth=1.6, label=LABELS[name], **look)
    axis.set_title(title)
    axis.set_ylim(0, max(*own, *(value for _, line in series for value in line), 1e-12) * 1.15)
    axis.grid(axis="y")
    if own or len(series) > 1:
        axis.legend(loc="best", fontsize=8.5, ncols=4)


def _mean_line(axis: Any, mean: float) -> None:
    axis.axvline(mean, color=ORANGE, linewidth=1, linestyle=(0, (4, 3)))
    axis.annotate(
        f"mean {_two_digits(mean)}", (mean, 0.99), (4, 0), xycoords=axis.get_xaxis_transform(), textcoords="offset points", rotation=90,
        va="top", ha="left", fontsize=8.5, color=ORANGE, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
    )  # fmt: skip


def _tail(axis: Any, beyond: dict[float, float], divergence: Divergence, smallest: float) -> None:
    """The share of tokens at or beyond each divergence, in %, with the quantiles on it; `smallest` is the share of one token."""
    marks = {
        divergence.p99: ("p99", 1.0),
        divergence.p999: ("p99.9", 0.1),
        divergence.max: ("max", smallest),
    }  # equal values: the last one stays
    line = sorted((beyond | {x: share for x, (_, share) in marks.items()}).items())
    axis.plot([x for x, _ in line], [share for _, share in line], color=BLUE, linewidth=1.8)
    for x, (label, share) in marks.items():
        axis.plot([x], [share], marker="o", markersize=4.5, color=ORANGE)
        axis.annotate(
            f"{label} {_two_digits(x)}",
            (x, share),
            (-7, -1),
            textcoords="offset points",
            va="center",
            ha="right",
            fontsize=8.5,
            color=ORANGE,
        )
    axis.set(title="The tail", ylabel="share of tokens at or beyond (%)", yscale="log", ylim=(smallest / 2.5, 160))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _two_digits(value: float) -> str:
    return f"{value:#.2g}".rstrip(".")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without the date and the name of the program in it: the same record gives the same bytes. Raises OSError."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=160, metadata={"Software": None})
