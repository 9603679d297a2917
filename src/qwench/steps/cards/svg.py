"""Drawings of the report as SVG text: no script, no font of its own, colours from the page's style, so that one drawing serves light and dark pages.

A drawing has a fixed inner size and grows with its box; inner sizes are those of a phone, so that letters stay readable there. Every mark has a `<title>`, which browsers
show under the pointer. Numbers come ready made: nothing is computed here but places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

WIDTH = 360
"""Inner width of a chart, in the units of its drawing."""
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 34
Scale = Callable[[float], float]


def drawing(width: float, height: float, parts: Iterable[str], label: str) -> str:
    """The whole drawing, at most a third larger than its inner size. `label` is what a reader who cannot see it hears."""
    return (
        f'<svg viewBox="0 0 {_n(width)} {_n(height)}" style="max-width:{_n(width * 1.34)}px" role="img" aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">'
        + "".join(parts) + "</svg>"
    )  # fmt: skip


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    chosen = f' class="{kind}"' if kind else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{chosen}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, title: str = "") -> str:
    """A rectangle; `fill` is a class of the page's style or a colour."""
    look = f'class="{fill}"' if not fill.startswith("#") else f'fill="{fill}"'
    shape = f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(height)}" {look}'
    return f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>"


def grid_map(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[tuple[str, str] | None]], label: str) -> str:
    """A table of coloured cells, row by row from the top; the columns' names stand upright above it.

    Args:
        cells: [row][column]: (class or colour, title), or None for nothing there.
    """
    size, left, top = 18.0, 62.0, 10 + 6.2 * max((len(name) for name in columns), default=0)
    parts = [
        f'<text transform="translate({_n(left + size * (i + 0.5) + 3)} {_n(top - 5)}) rotate(-90)">{escape(name)}</text>'
        for i, name in enumerate(columns)
    ]
    for place, (name, line) in enumerate(zip(rows, cells, strict=True)):
        y = top + size * 0.72 * place
        parts.append(text(left - 6, y + size * 0.52, name, "end"))
        for i, cell in enumerate(line):
            if cell:
                parts.append(box(left + size * i, y, size - 1.5, size * 0.72 - 1.5, cell[0], cell[1]))
    return drawing(left + size * len(columns) + 12, top + size * 0.72 * len(rows) + 4, parts, label)


def bars(rows: Sequence[tuple[str, float | None, float]], show: Callable[[float], str], label: str) -> str:
    """Two bars for each name, before (where it is known) and after."""
    most = max([value for _, *pair in rows for value in pair if value] or [1.0])
    left, pitch, room = 66.0, 30.0, WIDTH - 66 - 62
    parts = []
    for place, (name, before, after) in enumerate(rows):
        y = 6 + pitch * place
        parts.append(text(left - 6, y + 14, name, "end"))
        for shift, kind, value in ((0, "before", before), (11, "after", after)):
            if value is not None:
                width = room * value / most
                parts.append(box(left, y + shift, max(width, 0.8), 9, kind, f"{name}, {kind}: {show(value)}"))
                parts.append(text(left + width + 4, y + shift + 8, show(value), kind="small"))
    return drawing(WIDTH, 10 + pitch * len(rows), parts, label)


def lines(
    series: Sequence[tuple[str, Sequence[float]]],
    unit: str,
    x_name: str,
    label: str,
    spread: Sequence[float] = (),
    under: Sequence[float] = (),
    marked: int | None = None,
) -> str:
    """Values over 0, 1, 2 ..., one line for each series: (class, values); the vertical axis begins at 0.

    Args:
        spread: standard errors of the first series; none where it is empty.
        under: values that stand as bars under the lines.
        marked: the bar of another colour.
    """
    height = 190.0
    count = max(len(under), *(len(values) for _, values in series))
    tops = [value + error for value, error in zip(series[0][1], spread, strict=False)]
    most = max([*under, *tops, *(value for _, values in series for value in values)]) or 1.0
    x = linear(-0.5, max(count, 2) - 0.5, LEFT, WIDTH - RIGHT)
    y = linear(0, most * 1.06, height - BOTTOM, TOP)
    parts = _axes(height, y, nice(0, most), lambda v: f"{v:g}{unit}", x, whole(count - 1), lambda v: f"{v:g}", x_name)
    width = 0.5 * (x(1) - x(0))
    for i, value in enumerate(under):
        kind = "mark" if i == marked else "under"
        parts.append(box(x(i) - width / 2, y(value), width, y(0) - y(value), kind, f"layer {i} by itself: {value:.3g}{unit}"))
    for i, (value, error) in enumerate(zip(series[0][1], spread, strict=False)):
        low, high = _n(y(max(value - error, 0))), _n(y(value + error))
        parts.append(f'<line x1="{_n(x(i))}" x2="{_n(x(i))}" y1="{high}" y2="{low}" class="{series[0][0]} thin"/>')
    for kind, values in series:
        points = " ".join(f"{_n(x(i))},{_n(y(v))}" for i, v in enumerate(values))
        parts.append(f'<polyline points="{points}" class="{kind}"/>')
        parts += [f'<circle cx="{_n(x(i))}" cy="{_n(y(v))}" r="2.6" class="{kind}"><title>after layer {i}: {v:.3g}{unit}</title></circle>' for i, v in enumerate(values)]  # fmt: skip
    return drawing(WIDTH, height, parts, label)


def histogram(edges: Sequence[float], counts: Sequence[int], mean: float, label: str) -> str:
    """Shares of all, in percent, over a logarithmic axis; empty bins at both ends are left out."""
    used = [i for i, count in enumerate(counts) if count]
    low, high, total, height = used[0], used[-1] + 1, sum(counts), 190.0
    shares = [100 * count / total for count in counts]
    x = logarithmic(edges[low], edges[high], LEFT, WIDTH - RIGHT)
    y = linear(0, max(shares) * 1.1, height - BOTTOM, TOP)
    parts = _axes(
        height, y, nice(0, max(shares)), lambda v: f"{v:g}%", x, decades(edges[low], edges[high]), power, "KL per token (nats)"
    )
    for i in range(low, high):
        title = f"{edges[i]:.2g} to {edges[i + 1]:.2g}: {counts[i]:,} tokens, {shares[i]:.2g}%"
        parts.append(box(x(edges[i]), y(shares[i]), x(edges[i + 1]) - x(edges[i]) - 0.5, y(0) - y(shares[i]), "after", title))
    if edges[low] <= mean <= edges[high]:
        parts.append(f'<line x1="{_n(x(mean))}" x2="{_n(x(mean))}" y1="{TOP}" y2="{_n(y(0))}" class="mark"/>')
        side = ("end", -4) if x(mean) > WIDTH - 90 else ("start", 4)
        parts.append(text(x(mean) + side[1], TOP + 1, f"mean {mean:.2g}", side[0], "small"))
    return drawing(WIDTH, height, parts, label)


def tail(points: Sequence[tuple[float, float]], marks: Sequence[tuple[str, float, float]], label: str) -> str:
    """Share of tokens at or beyond each divergence, both logarithmic; marks are (name, divergence, share)."""
    shown = {at: (name, share) for name, at, share in marks}  # of equal values the last one stays
    height, smallest = 190.0, min(share for share in (*(share for _, share in points), *(share for _, share in shown.values())))
    x = logarithmic(points[0][0], max(points[-1][0], *(at for _, at, _ in marks)) * 1.1, LEFT, WIDTH - RIGHT)
    y = logarithmic(smallest / 1.6, 150, height - BOTTOM, TOP)
    high = max(points[-1][0], *(at for _, at, _ in marks))
    parts = _axes(
        height, y, decades(smallest, 100), lambda v: f"{v:g}%", x, decades(points[0][0], high), power, "KL per token (nats)"
    )
    path = sorted({(at, share) for at, share in points} | {(at, share) for at, (_, share) in shown.items()})
    parts.append(f'<polyline points="{" ".join(f"{_n(x(at))},{_n(y(share))}" for at, share in path)}" class="after"/>')
    for at, (name, share) in shown.items():
        parts.append(
            f'<circle cx="{_n(x(at))}" cy="{_n(y(share))}" r="3.2" class="mark"><title>{name}: {at:.3g} nats</title></circle>'
        )
        parts.append(text(x(at) - 6, y(share) + 3, f"{name} {at:.2g}", "end", "small"))
    return drawing(WIDTH, height, parts, label)


def intervals(groups: Sequence[tuple[str, Sequence[tuple[str, float, float]]]], label: str) -> str:
    """Means with their standard errors side by side, in percent from 0 to 100: [(position, [(class, mean, error)])]."""
    height = 190.0
    x = linear(-0.5, len(groups) - 0.5, LEFT, WIDTH - RIGHT)
    y = linear(0, 100, height - BOTTOM, TOP)
    parts = _axes(height, y, [0, 20, 40, 60, 80, 100], lambda v: f"{v:g}%", x, [], power, "draft position")
    for place, (name, values) in enumerate(groups):
        parts.append(text(x(place), height - BOTTOM + 13, name, "middle", "small"))
        for shift, (kind, mean, error) in enumerate(values):
            at = x(place) + 16 * (shift - (len(values) - 1) / 2)
            top, bottom = y(min(mean + error, 100)), y(max(mean - error, 0))
            parts.append(f'<line x1="{_n(at)}" x2="{_n(at)}" y1="{_n(top)}" y2="{_n(bottom)}" class="{kind}"/>')
            parts.append(f'<circle cx="{_n(at)}" cy="{_n(y(mean))}" r="4" class="{kind}"><title>{kind}, position {name}: {mean:.1f}% ± {error:.1f}%</title></circle>')  # fmt: skip
    return drawing(WIDTH, height, parts, label)


def scatter(points: Sequence[tuple[str, float, float, float]], show: Callable[[float], str], x_name: str, label: str) -> str:
    """(name, x, y, standard error of y) with y logarithmic and above 0; names stand beside their points."""
    height = 220.0
    x = linear(0, max(at for _, at, *_ in points) * 1.25, LEFT + 6, WIDTH - RIGHT)
    low, high = min(value for *_, value, _ in points), max(value + error for *_, value, error in points)
    y = logarithmic(low / 1.8, high * 1.6, height - BOTTOM, TOP)
    ticks = nice(0, max(at for _, at, *_ in points) * 1.25, 4)
    parts = _axes(height, y, decades(low / 1.8, high * 1.6), power, x, ticks, show, x_name)
    for name, at, value, error in points:
        bottom, top = _n(y(max(value - error, low / 1.8))), _n(y(value + error))
        parts.append(f'<line x1="{_n(x(at))}" x2="{_n(x(at))}" y1="{top}" y2="{bottom}" class="after thin"/>')
        parts.append(f'<circle cx="{_n(x(at))}" cy="{_n(y(value))}" r="4" class="after"><title>{escape(name)}: {show(at)}, {value:.3g} ± {error:.2g}</title></circle>')  # fmt: skip
        parts.append(text(x(at) + 7, y(value) + 3, name, kind="small"))
    return drawing(WIDTH, height, parts, label)


def strips(rows: Sequence[tuple[str, Sequence[tuple[float, bool]]]], x_name: str, label: str) -> str:
    """A row of dots for each name: (place, whether it stayed). Dots are one path for each kind and row: there may be ten thousand."""
    pitch = 11.0
    most = max((value for _, dots in rows for value, _ in dots), default=1.0) or 1.0
    height = TOP + pitch * len(rows) + BOTTOM
    x = linear(0, most * 1.03, LEFT, WIDTH - RIGHT)
    parts = _axes(height, linear(0, 1, height - BOTTOM, TOP), [], power, x, nice(0, most), lambda v: f"{v:g}", x_name)
    for place, (name, dots) in enumerate(rows):
        y = TOP + pitch * (place + 0.5)
        parts.append(text(LEFT - 6, y + 3, name, "end", "small"))
        for kind, stays in (("went", False), ("stayed", True)):
            path = "".join(f"M{_n(x(value))} {_n(y)}h0" for value, stayed in dots if stayed == stays)
            parts.append(f'<path d="{path}" class="dots {kind}"/>' if path else "")
    return drawing(WIDTH, height, parts, label)


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """From values to places."""
    return lambda value: start + (end - start) * (value - low) / (high - low)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    low, high = math.log(low), math.log(high)
    inner = linear(low, high if high > low else low + 1, start, end)
    return lambda value: inner(math.log(value))


def nice(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two values: at most `count` steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    if rough <= 0:
        return [low]
    power_of_ten = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power_of_ten, 2 * power_of_ten, 5 * power_of_ten, 10 * power_of_ten) if step >= rough * 0.999)
    return [round(step * i, 12) for i in range(math.ceil(low / step), math.floor(high / step * 1.0001) + 1)]


def whole(most: int) -> list[float]:
    """Whole numbers from 0 to `most`."""
    return [value for value in nice(0, max(most, 1), 8) if value == int(value) and value <= most]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten between two values; every second one where there are many."""
    exponents = list(range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1))
    return [10.0**e for e in exponents[:: 1 if len(exponents) <= 6 else 2]]


def power(value: float) -> str:
    """A power of ten for an axis: `0.01`, `1e-5`."""
    return f"{value:g}"


def _axes(
    height: float, y: Scale, y_ticks: Sequence[float], y_text: Callable[[float], str], x: Scale, x_ticks: Sequence[float],
    x_text: Callable[[float], str], x_name: str,
) -> list[str]:  # fmt: skip
    """Grid lines with their numbers, the base line, the name of the horizontal axis."""
    floor = height - BOTTOM
    parts = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_n(y(v))}" y2="{_n(y(v))}" class="grid"/>' for v in y_ticks]
    parts += [text(LEFT - 5, y(v) + 3, y_text(v), "end", "small") for v in y_ticks]
    parts += [text(x(v), floor + 13, x_text(v), "middle", "small") for v in x_ticks]
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_n(floor)}" y2="{_n(floor)}" class="axis"/>')
    return [*parts, text((LEFT + WIDTH - RIGHT) / 2, height - 4, x_name, "middle", "small")]


def _n(value: float) -> str:
    """A place with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")
