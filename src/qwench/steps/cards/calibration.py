"""What a card says of weights that calibration barely reached, and what became of each: the fallbacks of GPTQ, AWQ, AutoRound and of input ranges, from what the methods reported."""

from __future__ import annotations

from typing import Any

from qwench.result import CalibrationFacts
from qwench.steps.fallbacks import RANGE_OF_OTHERS, ROUNDED, SILENT, UNREACHED

NAMED = 6
"""Sets of weights that a card names before it counts the rest; the record has all."""


def reach_values(calibration: CalibrationFacts | None, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The section on what calibration reached: lines for a list, and whether experts were shown all tokens. None where nothing was read or there is nothing to say."""
    if calibration is None:
        return None
    every = (recipe.get("calibration") or {}).get("experts") == "all"
    lines = fallbacks(calibration.reports)
    return {"every": every, "lines": lines} if every or lines else None


def fallbacks(reports: dict[str, str]) -> list[str]:
    """One line for each kind of fallback that happened."""
    rounded = {name: says.removeprefix(ROUNDED) for name, says in reports.items() if says.startswith(ROUNDED)}
    lines = [
        f"GPTQ: {_count(rounded, 'set')} rounded to nearest instead, with scales of least squared error: {_named(rounded)}"
    ] * bool(rounded)
    lines += [
        f"AutoRound: {name.removesuffix(UNREACHED)}: {says}" for name, says in reports.items() if name.endswith(UNREACHED)
    ]
    lines += [f"AWQ: {name}: {SILENT}{says.partition(SILENT)[2]}" for name, says in reports.items() if SILENT in says]
    return lines + [
        f"Ranges: {name}: {_part(says, RANGE_OF_OTHERS)}" for name, says in reports.items() if RANGE_OF_OTHERS in says
    ]


def _count(found: dict[str, str], what: str) -> str:
    return f"{len(found)} {what}{'s' if len(found) != 1 else ''} of weights"


def _named(found: dict[str, str]) -> str:
    shown = "; ".join(f"`{name}` ({says})" for name, says in list(found.items())[:NAMED])
    return shown + (f"; and {len(found) - NAMED} more" if len(found) > NAMED else "")


def _part(says: str, marker: str) -> str:
    """The part of a report, between its semicolons, that a marker is in."""
    return next(part for part in says.split("; ") if marker in part)
