"""report.html: all that a record says of a release, on one page that needs no network: no script, no font, no picture from elsewhere.

It comes from `result.json` as the card does (and the shapes from `config.json`), through the same functions where both show the same: a number stands in both or in neither.
A section whose numbers were not measured says what measures them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from qwench.errors import CheckpointError
from qwench.models import map_of, sketch
from qwench.models.map import LAYER_ROLES, Block
from qwench.result import Divergence, Evaluation, Figures, FileFact, PrecisionRow, PruningFacts, Result, TensorError
from qwench.steps.cards import svg as svg
from qwench.steps.cards.engines import TITLES, status
from qwench.steps.cards.heads import gate_values, graft_values
from qwench.steps.cards.layers import costliest, divergence_errors, divergences, hidden_errors, own_errors, sides
from qwench.steps.cards.plots import byte_rows, layer_table, shade_range, size_text
from qwench.steps.cards.pruning import pruning_values
from qwench.steps.cards.speculation import speculation_values
from qwench.steps.cards.values import (
    NOT_MEASURED,
    acceptance_rows,
    base_name,
    duration,
    error_rows,
    evaluation_values,
    headline,
    memory_text,
    rendered,
    task_values,
    verified_text,
)
from qwench.steps.gguf.card import ladder
from qwench.steps.gguf.card import networks as gguf_networks

FILE_NAME = "report.html"
READINGS = [("after", "release"), ("without", "without corrections")]
"""How drawings call the readings of a release."""
SHADES = 5
"""Steps of the colour scale; their colours are in the page's style."""


def report_text(result: Result, config: dict[str, Any], title: str) -> str:
    """The page as HTML.

    Args:
        result: the record of the release.
        config: its config.json.
        title: the name of the release.
    """
    return rendered("report.html.j2", report_values(result, config, title), escape=True)


def report_values(result: Result, config: dict[str, Any], title: str) -> dict[str, Any]:
    """What the template fills in: text, and drawings as markup."""
    networks = gguf_networks(result)
    measured = measured_networks(result)
    return {
        "title": title,
        "base": base_name(result),
        "recipe_name": result.recipe.get("name", "unnamed"),
        "recipe_about": result.recipe.get("about", ""),
        "recipe": yaml.safe_dump(result.recipe, sort_keys=False, allow_unicode=True, width=100),
        "tiles": tiles(result, measured),
        "types": stored_types(networks),
        "ladder": ladder(result),
        "sizes": size_drawing(networks),
        "precision": _drawn(precision_map, result, config),
        "schemes": schemes(result.errors),
        "stored": [(row.component, row.stored, row.tensors, size_text(row.bytes)) for row in result.precision],
        "bytes": [
            (name, bytes_drawing(rows), all(row.source_bytes is not None for row in rows))
            for name, rows in _precisions(result, networks)
        ],
        "weights": _drawn(weight_map, result.errors),
        "weight_scale": weight_scale(result.errors),
        "weight_rows": error_rows(result.errors),
        "quality": [(name, quality(evaluation)) for name, evaluation in measured],
        "pruning": pruning_drawing(result.pruning) if result.pruning else None,
        "pruned": pruning_values(result.pruning),
        "calibration": result.calibration,
        "gate": gate_values(result.acceptance),
        "gates": [(file.name, values) for file in result.files if (values := gate_values(file.acceptance))],
        "graft": graft_values(result.graft),
        "proofs": result.load_proofs,
        "engines": [
            (
                TITLES.get(v.engine, v.engine)
                + (f", {v.file}" if v.file else "")
                + (", with corrections" if v.adapter else ""),
                v.outcome,
                status(v).replace("**", ""),
                v.notes,
            )
            for v in result.verifications
        ],
        "tasks": task_values(result.tasks),
        "timings": timings(result, measured),
        "files": [(file.name, size_text(file.bytes)) for file in result.files],
        "version": result.qwench,
        "source": result.source,
    }


def measured_networks(result: Result) -> list[tuple[str, Evaluation]]:
    """(name, figures) of what was measured: the release, or each file of a GGUF release; the name of a release is empty."""
    if result.evaluation:
        return [("", result.evaluation)]
    return [(file.name, file.evaluation) for file in result.files if file.evaluation]


def tiles(result: Result, measured: list[tuple[str, Evaluation]]) -> list[tuple[str, str, str]]:
    """(what, how much, and the same without corrections) for the top of the page. Of several files the smallest divergence and the largest are shown."""
    size = f"{size_text(result.bytes)}, {100 * result.bytes / result.source.bytes:.0f}% of {size_text(result.source.bytes)}"
    if len(measured) > 1:
        means = sorted(evaluation.divergence.mean.mean for _, evaluation in measured)
        sizes = sorted(file.bytes for file in result.files if file.evaluation)
        found = [(f"size of {len(measured)} files", f"{size_text(sizes[0])} to {size_text(sizes[-1])}", "")]
        return [
            *found,
            ("mean KL, nats per token", f"{means[0]:.2g} to {means[-1]:.2g}", ""),
            ("agrees with our reading", verified_text(result), ""),
        ]
    only = headline(measured[0][1] if measured else None)
    return [
        ("size", size, ""),
        ("mean KL from the source", *only["divergence"]),
        ("same most likely token", *only["agreement"]),
        ("drafts accepted, source / release", *only["acceptance"]),
        ("perplexity, source / release", *only["perplexity"]),
        ("agrees with our reading", verified_text(result), ""),
    ]


def schemes(errors: list[TensorError]) -> list[str]:
    """Number formats of quantized weights, in the order of their first occurrence: their place is their colour."""
    return list(dict.fromkeys(error.scheme for error in errors))


def precision_map(result: Result, config: dict[str, Any]) -> Markup | None:
    """Every layer from the input to the output, each linear weight in the colour of its format; None where the record names no weights (GGUF)."""
    if not result.errors:
        return None
    found, known = _schemes_by_place(result.errors), schemes(result.errors)
    network = map_of(sketch(config))
    rows = [(str(block.index), block, "") for block in network.blocks]
    if any(row.component == "mtp" and row.tensors for row in result.precision):
        rows += [("mtp", block, "mtp.") for block in network.mtp]
    columns = [role for role in LAYER_ROLES if any(_linear(block, prefix + role) for _, block, prefix in rows)]
    cells = [
        [_cell(block, prefix + role, found.get((prefix + role, block.index), set()), known) for role in columns]
        for _, block, prefix in rows
    ]
    return Markup(
        svg.grid_map([name for name, *_ in rows], columns, cells, "number format of every linear weight, layer by layer")
    )


def _schemes_by_place(errors: list[TensorError]) -> dict[tuple[str, int], set[str]]:
    found: dict[tuple[str, int], set[str]] = defaultdict(set)
    for error in errors:
        if error.layer is not None:
            found[error.role, error.layer].add(error.scheme)
    return found


def _linear(block: Block, role: str) -> bool:
    return any(slot.role == role and slot.linear for slot in block.slots)


def _cell(block: Block, role: str, used: set[str], known: list[str]) -> tuple[str, str] | None:
    """(class, title) of one weight of one layer; None where the layer has none such."""
    slots = [slot for slot in block.slots if slot.role == role and slot.linear]
    if not slots:
        return None
    shape = " x ".join(str(size) for size in slots[0].shape)
    count = f"{len(slots)} of " if len(slots) > 1 else ""
    kind = f"scheme{known.index(min(used)) % SHADES}" if used else "kept"
    return kind, f"{block.label}, {role}: {', '.join(sorted(used)) or 'kept as it was'}, {count}{shape}"


def _precisions(result: Result, networks: list[FileFact]) -> list[tuple[str, list[PrecisionRow]]]:
    if result.precision:
        return [("", result.precision)]
    return [(file.name, file.precision) for file in networks if file.precision]


def stored_types(networks: list[FileFact]) -> dict[str, Any] | None:
    """What each component is stored as in each file of a GGUF release: `files`, and `rows` of a component and its types; None where there are no such files."""
    kept = [file for file in networks if file.precision]
    components = list(dict.fromkeys(row.component for file in kept for row in file.precision))
    cells = {
        (file.name, component): ", ".join(f"{row.tensors} {row.stored}" for row in file.precision if row.component == component)
        for file in kept
        for component in components
    }
    rows = [(component, [cells[file.name, component] or "-" for file in kept]) for component in components]
    return {"files": [file.file_type or file.name for file in kept], "rows": rows} if kept else None


def size_drawing(networks: list[FileFact]) -> Markup | None:
    """Size of each file against its divergence; None where fewer than two were measured. One that equals the source has no place on a logarithmic axis."""
    means = {file.name: file.evaluation.divergence.mean for file in networks if file.evaluation}
    points = [
        (file.file_type or file.name, float(file.bytes), means[file.name].mean, means[file.name].standard_error)
        for file in networks
        if file.name in means and means[file.name].mean > 0
    ]
    return Markup(svg.scatter(points, size_text, "size of the file", "size and divergence")) if len(points) > 1 else None


def bytes_drawing(rows: list[PrecisionRow]) -> Markup:
    """Bytes by component, source and release, as the card draws them."""
    return Markup(svg.bars(byte_rows(rows), size_text, "bytes by component"))


def weight_map(errors: list[TensorError]) -> Markup | None:
    """Round-trip error of every quantized role in every layer; None where there are none."""
    roles, table = layer_table(errors)
    if not roles:
        return None
    low, high = shade_range(table * 100)

    def cell(role: str, layer: int, value: float) -> tuple[str, str] | None:
        if np.isnan(value):
            return None
        step = min(int(SHADES * (100 * value - low) / (high - low)), SHADES - 1) if high > low else 0
        return f"shade{step}", f"layer {layer}, {role}: {100 * value:.2f}%"

    cells = [[cell(role, layer, table[i, layer]) for i, role in enumerate(roles)] for layer in range(table.shape[1])]
    return Markup(
        svg.grid_map([str(i) for i in range(table.shape[1])], roles, cells, "relative round-trip error of weights by layer")
    )


def weight_scale(errors: list[TensorError]) -> list[tuple[str, str]]:
    """(class, text) of each step of the colours of `weight_map`: the errors from which it is used; nothing where there are none."""
    roles, table = layer_table(errors)
    if not roles:
        return []
    low, high = shade_range(table * 100)
    return [(f"shade{step}", f"{max(low + (high - low) * step / SHADES, 0):.2g}%") for step in range(SHADES)]


def quality(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that one evaluation shows."""
    divergence = evaluation.divergence
    drawn = divergence.max > 0 and any(divergence.histogram_counts)
    return {
        "values": evaluation_values(evaluation),
        "histogram": Markup(svg.histogram(divergence.histogram_edges, divergence.histogram_counts, divergence.mean.mean, "tokens by divergence")) if drawn else None,
        "tail": Markup(tail_drawing(divergence)) if drawn else None,
        "hidden": depth_drawing(evaluation, hidden_errors, "%", "difference of hidden states by layer", own=own_errors(evaluation)),
        "own": bool(own_errors(evaluation)),
        "by_layer": depth_drawing(evaluation, divergences, "", "KL by layer", divergence_errors(evaluation)),
        "acceptance": acceptance_drawing(evaluation),
        "acceptance_rows": acceptance_rows(evaluation),
        "speculation": speculation_values(evaluation),
        "readings": READINGS if evaluation.without_corrections else READINGS[:1],
    }  # fmt: skip


def depth_drawing(
    evaluation: Evaluation, of: Callable[[Figures], list[float]], unit: str, label: str, spread: Sequence[float] = (), own: Sequence[float] = ()
) -> Markup | None:  # fmt: skip
    """A measure after every layer, for each reading of the release, over what each layer adds by itself (`own`); None where nothing differs or nothing was measured."""
    series = [(kind, values) for kind, figures in sides(evaluation) if (values := of(figures))]
    if not any(value for _, values in series for value in values):
        return None
    return Markup(svg.lines(series, unit, "decoder layer", label, spread, own, costliest(own)))


def tail_drawing(divergence: Divergence) -> str:
    """Share of tokens at or beyond each divergence, in percent, with the quantiles that were measured."""
    counts, edges = np.array(divergence.histogram_counts), divergence.histogram_edges
    used = np.flatnonzero(counts)
    beyond = 100 * counts[::-1].cumsum()[::-1] / counts.sum()
    points = [(edges[i], float(beyond[i])) for i in range(used[0], used[-1] + 1) if edges[i] < divergence.max]
    marks = [("p99", divergence.p99, 1.0), ("p99.9", divergence.p999, 0.1), ("max", divergence.max, 100 / int(counts.sum()))]
    return svg.tail(points, [mark for mark in marks if mark[1] > 0], "share of tokens at or beyond each divergence")


def acceptance_drawing(evaluation: Evaluation) -> Markup | None:
    """Drafts accepted by position, side by side; None where none were measured."""
    found = {"before": evaluation.acceptance_source} | {kind: figures.acceptance_release for kind, figures in sides(evaluation)}
    count = max((len(side.by_position) for side in found.values() if side), default=0)
    if not count:
        return None
    groups = [
        (str(i + 1), [(k, 100 * s.by_position[i].mean, 100 * s.by_position[i].standard_error) for k, s in found.items() if s and i < len(s.by_position)])
        for i in range(count)
    ]  # fmt: skip
    return Markup(svg.intervals(groups, "drafts accepted by position"))


def pruning_drawing(facts: PruningFacts) -> Markup:
    """Every expert by its saliency against the mean of its layer, and whether it stayed."""
    rows = []
    for layer in facts.layers:
        mean, kept = max(float(np.mean(layer.saliency)), 1e-30), set(layer.kept)
        name = layer.label if layer.component == "mtp" else str(layer.layer)
        rows.append((name.replace(" layer", ""), [(value / mean, i in kept) for i, value in enumerate(layer.saliency)]))
    return Markup(svg.strips(rows, "saliency, of the layer's mean", "experts that stayed and went, by saliency"))


def timings(result: Result, measured: list[tuple[str, Evaluation]]) -> list[tuple[str, str]]:
    """What the run and each measurement took."""
    run = result.run
    rows = [("the run", f"{duration(run.seconds)} on {run.device} with {run.threads} threads; {memory_text(run)}")]
    if run.resumed_tensors:
        rows.append(("of an earlier, stopped run", f"{run.resumed_tensors} tensors or files"))
    for name, evaluation in measured:
        if evaluation.seconds:
            rows.append(
                (
                    f"measuring {name or 'the release'}",
                    f"{duration(evaluation.seconds)}, {size_text(evaluation.peak_rss)} of memory at most",
                )
            )
    return rows


def _drawn(draw: Callable[..., Markup | None], *given: Any) -> Markup | None:
    """A drawing, or None where a config is too odd to draw it from: a report is no place to fail for that."""
    try:
        return draw(*given)
    except CheckpointError:
        return None


def write_report(folder: Path, result: Result, config: dict[str, Any]) -> Path:
    """Write report.html into a release folder, in one move; returns its path. Raises OSError."""
    beside = folder / (FILE_NAME + ".new")
    beside.write_text(report_text(result, config, folder.resolve().name), encoding="utf-8")
    return beside.replace(folder / FILE_NAME)


__all__ = ["FILE_NAME", "NOT_MEASURED", "report_text", "report_values", "write_report"]
