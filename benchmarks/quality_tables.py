"""Tables of docs/guide/2-choose-a-recipe.md from what `benchmarks.quality` measured; nothing in them is typed by hand.

python -m benchmarks.quality_tables
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "guide" / "2-choose-a-recipe.md"
MODELS = {"dense": "Dense", "moe": "Mixture of experts"}
BEGIN, END = "<!-- {name}: made by `python -m benchmarks.quality_tables` -->", "<!-- {name}: end -->"
Row = dict[str, Any]
SAID = {
    "agrees": "agrees",
    "loads": "loads, **wrong numbers**",
    "loads by its rules": "loads, by its rules",
    "refused by its rules": "**no**, by its rules",
    "failed": "not without that format's own package",
}
"""What a reader's outcome is called in the table; anything else is said as it is."""


def rows_of(which: str) -> list[Row]:
    """What was measured on one model."""
    rows: list[Row] = json.loads((RESULTS / f"quality-{which}.json").read_text(encoding="utf-8"))
    return rows


def quality_table(rows: Iterable[Row]) -> str:
    """Size, divergence and acceptance, one line for each release or file; recipes whose files measure the same share a line. Smallest divergence first."""
    merged: dict[tuple[Any, ...], tuple[list[str], Row]] = {}
    for row in sorted(rows, key=lambda row: float(row["kl_mean"])):
        same = (row.get("file"), row["bytes"], row["kl_mean"], row["acceptance_1_release"])
        merged.setdefault(same, ([], row))[0].append(f"`{row['recipe']}`")
    lines = [
        "| recipe | size | of source | KL to the source, mean ± SE | top-1 | MTP drafts accepted |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for names, row in merged.values():
        name = ", ".join(names) + (f" {row['file']}" if row.get("file") else "")
        accepted = "no head" if row["acceptance_1_release"] is None else f"{row['acceptance_1_release']:.1%}"
        lines.append(
            f"| {name} | {row['bytes'] / 1e6:.2f} MB | {row['share']:.1%} | {row['kl_mean']:.5f} ± {row['kl_standard_error']:.5f} "
            f"| {row['top1']:.1%} | {accepted} |"
        )
    return "\n".join(lines)


def readers_table(rows: dict[str, list[Row]]) -> str:
    """Which engine reads which recipe, on each model; a file format that an engine has no word for is left open."""
    engines = ("vllm", "sglang", "transformers", "llama.cpp", "gptqmodel", "auto-round")
    names = sorted({row["recipe"] for found in rows.values() for row in found})
    lines = [
        "| recipe | model | vLLM 0.32 | SGLang 0.5.23 | transformers 5.23 | llama.cpp | GPTQModel 7.7 | auto-round 0.16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        for which, found in rows.items():
            mine = [row["readers"] for row in found if row["recipe"] == name]
            if mine:
                said = [SAID.get(outcome, outcome) for outcome in (_worst(mine, engine) for engine in engines)]
                lines.append(f"| `{name}` | {which} | {' | '.join(said)} |")
    return "\n".join(lines)


def _worst(readers: list[dict[str, str]], engine: str) -> str:
    """What an engine makes of every file of a release: what is said of the first that it does not agree with."""
    outcomes = [found[engine] for found in readers if engine in found]
    return next((outcome for outcome in outcomes if outcome != "agrees"), outcomes[0] if outcomes else "")


def facts(rows: list[Row]) -> str:
    """What stands before a table."""
    source = rows[0]["acceptance_1_source"]
    tuned = sorted({str(row["tuning"]) for row in rows if row.get("tuning")})
    said = f"The source's own MTP head is accepted at {source:.1%}."
    return said + (f" AutoRound tuned for {', '.join(tuned)}; the recipes themselves ask for more." if tuned else "")


def filled(page: str) -> str:
    """The page with its tables made anew."""
    rows = {which: rows_of(which) for which in MODELS}
    for which, found in rows.items():
        page = _between(page, which, f"{facts(found)}\n\n{quality_table(found)}")
    return _between(page, "readers", readers_table(rows))


def _between(page: str, name: str, text: str) -> str:
    begin, end = BEGIN.format(name=name), END.format(name=name)
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{PAGE.name} has no place for the table {name}"
    return f"{before}{begin}\n{text}\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
