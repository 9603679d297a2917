"""What a card says of the MTP head besides its acceptance in an evaluation: where it was grafted from and how it fits, and what the run measured before it finished."""

from __future__ import annotations

from typing import Any

from qwench.result import Acceptance, AcceptanceCheck, Distance, GraftFacts

UNKNOWN = "not measured"


def graft_values(facts: GraftFacts | None) -> dict[str, Any] | None:
    """The section on a graft, as text; None where nothing was grafted."""
    if facts is None:
        return None
    rows = [
        {
            "position": position,
            "donor": _share(facts.acceptance_donor, position),
            "here": _share(facts.acceptance_source, position),
        }
        for position in range(1, _positions(facts.acceptance_donor, facts.acceptance_source) + 1)
    ]
    return {
        "what": " and ".join({"mtp": "MTP head", "vision": "vision tower"}[component] for component in facts.components),
        "donor": f"{facts.donor}@{facts.revision}" if facts.revision else facts.donor,
        "tensors": facts.tensors,
        "distances": [
            {"name": name, "moved": f"{100 * found.relative_rms:.3g}%", "rows": _rows(found)}
            for name, found in (("embedding", facts.embedding), ("lm_head", facts.head))
            if found is not None
        ],
        "tokens": _tokens(facts),
        "rows": rows,
        "notes": facts.notes,
    }


def gate_values(check: AcceptanceCheck | None) -> dict[str, str] | None:
    """The sentence on what the run measured; None where nothing was to be measured."""
    if check is None:
        return None
    return {
        "source": _share(check.source, 1),
        "release": _share(check.release, 1),
        "floor": f"{100 * check.floor:.0f}%",
        "rows": f"{check.documents} documents of {check.length} tokens",
        "not_measured": check.not_measured,
        "overridden": "yes" if check.overridden else "",
    }


def _tokens(facts: GraftFacts) -> str:
    if facts.differing_tokens is None:
        return "not compared"
    return f"{facts.differing_tokens} tokens differ" if facts.differing_tokens else "the same"


def _rows(found: Distance) -> str:
    return "all rows" if found.rows == found.of_rows else f"{found.rows:,} of {found.of_rows:,} rows"


def _positions(*found: Acceptance | None) -> int:
    return max((len(side.by_position) for side in found if side), default=0)


def _share(found: Acceptance | None, position: int) -> str:
    if found is None or position > len(found.by_position):
        return UNKNOWN
    estimate = found.by_position[position - 1]
    return f"{100 * estimate.mean:.1f}% ± {100 * estimate.standard_error:.1f}%"
