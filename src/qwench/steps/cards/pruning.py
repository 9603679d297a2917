"""What a card says of experts that went: how many, how they were ranked, what of the layers' work stayed, whom calibration barely reached; and the picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qwench.result import PrunedLayer, PruningFacts

STAYED, WENT = "#0072B2", "#D55E00"
NAMED = 8
"""Warnings that a card repeats before it counts the rest."""
CRITERIA = {
    "reap": "the mean over its tokens of router weight times norm of the expert's output (REAP, arXiv:2510.13999)",
    "frequency": "the number of tokens that are sent to it",
    "weight_sum": "the sum of the router's weights for it",
    "norm_mean": "the mean norm of its output",
    "norm_sum": "the sum of the norms of its output",
    "contribution_sum": "the sum of router weight times norm of its output",
    "norm_max": "the largest norm of its output",
    "random": "nothing: they were chosen at random",
}


def pruning_values(facts: PruningFacts | None) -> dict[str, Any] | None:
    """The section on pruning, as text; None where nothing was pruned."""
    if facts is None:
        return None
    least = min(facts.layers, key=lambda layer: layer.contribution_kept)
    count = len(facts.layers)
    more = len(facts.warnings) - NAMED
    return {
        "gone": facts.before - facts.after,
        "before": facts.before,
        "after": facts.after,
        "top_k": facts.top_k,
        "layers": sum(layer.component == "text" for layer in facts.layers),
        "head": any(layer.component == "mtp" for layer in facts.layers),
        "criterion": CRITERIA[facts.criterion],
        "saliency": f"{sum(layer.saliency_kept for layer in facts.layers) / count:.1%}",
        "contribution": f"{sum(layer.contribution_kept for layer in facts.layers) / count:.1%}",
        "least": f"{least.label}, {least.contribution_kept:.1%}",
        "repair": repair_words(facts),
        "warnings": [*facts.warnings[:NAMED], *([f"and {more} layers more"] if more > 0 else [])],
    }


def repair_words(facts: PruningFacts) -> str:
    """What became of the repair; nothing where none was tried."""
    judged = [(layer.error, layer.error_repaired) for layer in facts.layers if layer.error is not None]
    if not judged:
        return ""
    before, after = (sum(side or 0.0 for side in sides) / len(judged) for sides in zip(*judged, strict=True))
    return (
        f"Then {sum(layer.repaired for layer in facts.layers)} down projections of shared experts and of those that stayed were changed by least squares: on calibration rows that they were not "
        f"fitted on, the relative squared error of what experts add went from {before:.3g} to {after:.3g}, in the mean over layers."
    )


def pruning_figure(layers: Sequence[PrunedLayer]) -> Figure:
    """Every expert as a dot, by its saliency against the mean of its layer; beside it the share of each layer's work that stayed."""
    figure = Figure(figsize=(7.6, 0.17 * len(layers) + 1.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    for place, layer in enumerate(layers):
        saliency = np.array(layer.saliency) / max(float(np.mean(layer.saliency)), 1e-30)
        stays = np.isin(np.arange(len(saliency)), layer.kept)
        for chosen, colour, label in ((stays, STAYED, "stayed"), (~stays, WENT, "went")):
            left.scatter(
                saliency[chosen], [place] * int(chosen.sum()), s=11, color=colour, alpha=0.6, linewidths=0, label=label if place == 0 else None
            )  # fmt: skip
    right.barh(range(len(layers)), [100 * layer.contribution_kept for layer in layers], color=STAYED, height=0.6)
    right.set(title="Work that stayed", xlabel="router weight x norm (%)", xlim=(0, 100))
    left.set(title="Experts by saliency", xlabel="saliency, of the layer's mean")
    left.set_yticks(range(len(layers)), [layer.label if layer.component == "mtp" else str(layer.layer) for layer in layers])
    left.set_ylabel("decoder layer")
    left.invert_yaxis()
    left.legend(loc="best", handletextpad=0.2)
    for axis in (left, right):
        axis.grid(axis="x")
        axis.tick_params(axis="y", length=0)
    return figure
