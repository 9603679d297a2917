"""What a card says about writing with drafts: source and release side by side, where it was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwench.result import Estimate, Evaluation, Speculation
from qwench.steps.cards.layers import sides

NOT_MEASURED = "not measured"


def speculation_values(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """What the template fills in; None where neither side was measured.

    Returns:
        `about` (one sentence), `rows` (what, and its value in each of `values.columns`), `threads`.
    """
    found = (
        [evaluation.speculation_source, *(figures.speculation_release for _, figures in sides(evaluation))]
        if evaluation
        else []
    )
    measured = [side for side in found if side]
    if not measured:
        return None
    return {
        "about": _about(measured[0]),
        "rows": [
            {"what": what, "cells": [text(side) if side else NOT_MEASURED for side in found]}
            for what, text in _lines(measured[0].drafts)
        ],
        "threads": f"{measured[-1].threads} thread{'s' if measured[-1].threads != 1 else ''}",
    }


def _lines(drafts: int) -> list[tuple[str, Callable[[Speculation], str]]]:
    def accepted_at(place: int) -> Callable[[Speculation], str]:
        return lambda side: _with_error(side.by_position[place], 100, 1, "%")

    return [
        ("drafted", lambda side: f"{side.drafted:,}"),
        ("accepted", lambda side: f"{side.accepted:,}"),
        *((f"accepted at position {place + 1}", accepted_at(place)) for place in range(drafts)),
        ("tokens per forward of the trunk", lambda side: _with_error(side.mean_length, 1, 2)),
        ("expected speedup", _speedup),
    ]


def _about(side: Speculation) -> str:
    how = (
        "greedily"
        if side.temperature == 0
        else f"at temperature {side.temperature:g}, top-p {side.top_p:g}, top-k {side.top_k}"
    )
    return (
        f"each model wrote {side.tokens} tokens {how} after each of {side.prompts} beginnings of {side.prompt_length} tokens, its head drafting {side.drafts} at a time "
        f"(SHA-256 of the beginnings' token ids `{side.prompts_sha256}`)"
    )


def _speedup(side: Speculation) -> str:
    return f"{side.speedup:.2f}" if side.steady else f"about {side.speedup:.1f} (busy machine)"


def _with_error(estimate: Estimate, factor: float, digits: int, unit: str = "") -> str:
    return f"{estimate.mean * factor:.{digits}f}{unit} ± {estimate.standard_error * factor:.{digits}f}{unit}"
