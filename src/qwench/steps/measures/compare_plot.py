"""The picture of a comparison: size against divergence, and size against acceptance of the MTP head. Down and to the left is better, then up and to the left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from qwench.steps.cards.plots import BLUE, GREY, ORANGE, STYLE, save_figure

COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#30343A")
"""Of the palette of Okabe and Ito; the yellow cannot be seen on white."""
SHAPES = ("o", "s", "D", "^")
COLUMNS = 3
"""Names in one line of the legend."""


def draw_comparison(data: dict[str, Any], path: Path) -> Path:
    """Draw what `compare.comparison_data` says into a PNG file; returns its path. Raises OSError."""
    with matplotlib.rc_context(STYLE):
        save_figure(comparison_figure(data), path)
    return path


def comparison_figure(data: dict[str, Any]) -> Figure:
    """Two panels, or one where no release drafts. A release has one colour and one shape in both; the legend names them from small to large."""
    rows = sorted(data["releases"], key=lambda row: row["bytes"])
    drafting = any(row["acceptance"] for row in rows)
    unit, name = (1e9, "GB") if max(row["bytes"] for row in rows) >= 2e9 else (1e6, "MB")
    lines = -(-len(rows) // COLUMNS)
    figure = Figure(figsize=(9.2 if drafting else 5.6, 3.9 + 0.2 * lines), layout="constrained")
    panels = figure.subplots(1, 2 if drafting else 1, squeeze=False)[0]
    _divergence(panels[0], rows, unit)
    if drafting:
        _acceptance(panels[1], rows, data["source"], unit)
    for axis in panels:
        axis.set_xlabel(f"size ({name})")
        axis.grid(True)
        axis.margins(x=0.12, y=0.15)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(COLUMNS, len(rows)))
    return figure


def _divergence(axis: Any, rows: list[dict[str, Any]], unit: float) -> None:
    for place, row in enumerate(rows):
        _point(axis, place, row["bytes"] / unit, row["kl"]["mean"], row["kl"]["standard_error"], row["name"])
    axis.set(title="Divergence from the source", ylabel="mean KL (nats per token)")
    means = [row["kl"]["mean"] for row in rows]
    if min(means) > 0 and max(means) > 5 * min(means):
        axis.set_yscale("log")


def _acceptance(axis: Any, rows: list[dict[str, Any]], source: dict[str, Any], unit: float) -> None:
    if source["acceptance"]:
        level = 100 * source["acceptance"][0]["mean"]
        axis.axhline(level, color=GREY, linewidth=1.2)
        axis.annotate(
            "the source", (1, level), (-3, 3), xycoords=axis.get_yaxis_transform(), textcoords="offset points", ha="right", fontsize=8.5
        )  # fmt: skip
    for place, row in enumerate(rows):
        if row["acceptance"]:
            first = row["acceptance"][0]
            _point(axis, place, row["bytes"] / unit, 100 * first["mean"], 100 * first["standard_error"], row["name"])
    axis.set(title="Drafts of the MTP head", ylabel="accepted at position 1 (%)")


def _point(axis: Any, place: int, x: float, y: float, error: float, name: str) -> None:
    """One release with its standard error."""
    color, shape = COLORS[place % len(COLORS)], SHAPES[place // len(COLORS) % len(SHAPES)]
    axis.errorbar([x], [y], yerr=[error], fmt=shape, color=color, markersize=6, capsize=3, linewidth=1.2, label=name)
