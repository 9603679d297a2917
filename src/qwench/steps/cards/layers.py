"""Where a release comes apart: error and divergence after every layer, and the layers that add most by themselves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from qwench.result import Evaluation, Figures

Side = tuple[str, Figures]
NAMED = 3
"""Layers that are named as those that cost most."""


def sides(evaluation: Evaluation) -> list[Side]:
    """The readings of a release by their class in drawings: `after`, and `without` where it was read without its corrections too."""
    without = evaluation.without_corrections
    return [("after", evaluation), *([("without", without)] if without else [])]


def hidden_errors(figures: Figures) -> list[float]:
    """Difference of hidden states from the source after each layer, percent."""
    return [100 * error for error in figures.hidden_error_by_layer]


def own_errors(figures: Figures) -> list[float]:
    """What each layer adds by itself, percent."""
    return [100 * error for error in figures.own_error_by_layer]


def divergences(figures: Figures) -> list[float]:
    """KL after each layer, nats per token; empty where it was not measured."""
    return [layer.mean for layer in figures.divergence_by_layer.by_layer] if figures.divergence_by_layer else []


def divergence_errors(figures: Figures) -> list[float]:
    """The standard errors of `divergences`."""
    return [layer.standard_error for layer in figures.divergence_by_layer.by_layer] if figures.divergence_by_layer else []


def costliest(values: Sequence[float]) -> int | None:
    """The layer with the largest value; None where there is none above 0."""
    return list(values).index(max(values)) if values and max(values) > 0 else None


def layer_words(evaluation: Evaluation) -> str:
    """One sentence on the layers that cost most; "" where it was not measured."""
    own = own_errors(evaluation)
    order = sorted((i for i, value in enumerate(own) if value > 0), key=lambda i: -own[i])
    if not order:
        return ""
    named = [f"layer {i} ({own[i]:.2g}%)" for i in order[:NAMED]]
    more = f", then {' and '.join(named[1:])}" if named[1:] else ""
    rest = f"; half of the layers add less than {statistics.median(own):.2g}%" if len(own) > 2 * NAMED else ""
    return f"By itself {named[0]} adds most to the hidden states{more}{rest}."
