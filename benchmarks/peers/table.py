"""The results as Markdown: a line for each entrant, and where a peer is ahead."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.entrants import OURS
from benchmarks.peers.recipes import SETS

MIB = 2**20
HEAD = (
    "| weights | entrant | KL ± SE (nats) | peer − ours, paired ± SE | top-1 | MTP draft 1 | CPU s | job alone | peak | above imports | MB | opens in |",
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
)


def markdown(record: dict[str, Any]) -> str:
    """All of a record, as `__main__` makes it."""
    rows = record["entrants"]
    said = [*_about(record), "", *HEAD, *(_line(row) for row in rows if "kl" in row), ""]
    absent = [f"- {row['name']}: {row['why_not']}" for row in rows if row.get("why_not")]
    ahead = [line for row in rows for line in _ahead(row, {r["name"]: r for r in rows})]
    ratios = [line for row in rows for line in _ratio(row, {r["name"]: r for r in rows})]
    for title, lines in (
        ("Peers beside ours", ratios),
        ("Where a peer is ahead, or takes less than twice our memory", ahead),
        ("Not in the table", absent),
    ):
        said += [f"## {title}", "", *(lines or ["nothing"]), ""]
    return "\n".join(said)


def _about(record: dict[str, Any]) -> list[str]:
    told, tuned = record["calibration"], record["tuned"]
    return [
        f"# Qwench and others on the {record['model']} demo checkpoint",
        "",
        f"Calibration: {told['rows']} rows of {told['length']} tokens of the carried text, the same ids for all; tuned methods (AutoRound) {tuned['rows']} of these rows, "
        f"{tuned['iterations']} iterations, batch {tuned['batch']}. KL in float32 on {record['held_documents']} held-out documents of {record['length']} tokens; the source's own MTP head has "
        f"{record['acceptance_source']:.3f} of its first drafts accepted. CPU seconds are user and system time of the process, and of the job alone, after the imports; memory (MiB) is the program's high-water mark, and what of it came on top of "
        f"the interpreter with the tool's libraries imported. One thread each (GPTQModel: two workers). Ours without the measuring of the MTP head that a run ends with, which no peer does (gated: with it). {record['machine']}.",
        "",
        *(f"- {name}: {what}" for name, what in SETS.items()),
    ]


def _line(row: dict[str, Any]) -> str:
    kl, pair = row["kl"], row.get("minus_rival")
    accepted = f"{row['acceptance']['mean']:.3f}" if row["acceptance"] else row["head"].split(":")[0]
    cells = [
        row["weights"], f"{'**' if row['who'] == OURS else ''}{row['label']}{'**' if row['who'] == OURS else ''}",
        f"{kl['mean']:.5f} ± {kl['standard_error']:.5f}", f"{pair['mean']:+.5f} ± {pair['standard_error']:.5f}" if pair else "",
        f"{row['top1']['mean']:.2%}", accepted, f"{row['cpu_seconds']:.1f}", f"{row['job_seconds']:.1f}",
        f"{row['peak'] / MIB:.0f}", f"{row['peak_above_imports'] / MIB:.0f}", f"{row['bytes'] / 1e6:.1f}", row.get("opens", ""),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _ratio(row: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> list[str]:
    """How many times ours a peer takes and loses."""
    ours = by_name.get(row.get("rival") or "")
    if not ours or "kl" not in row or "kl" not in ours:
        return []
    kl, seconds, memory = (
        row[key] / ours[key] if not isinstance(row[key], dict) else row[key]["mean"] / ours[key]["mean"]
        for key in ("kl", "job_seconds", "peak_above_imports")
    )
    return [
        f"- {row['label']} / {ours['label']}: {kl:.2f} times the KL, {seconds:.1f} times the CPU time of the job, {memory:.1f} times its memory"
    ]


def _ahead(row: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> list[str]:
    """What a peer does better than its rival of ours. A difference of KL counts from two standard errors."""
    ours = by_name.get(row.get("rival") or "")
    if not ours or "kl" not in row or "kl" not in ours:
        return []
    pair, lines = row["minus_rival"], []
    if pair["mean"] < -2 * pair["standard_error"]:
        lines.append(f"- KL: {row['label']} {row['kl']['mean']:.5f}, {ours['label']} {ours['kl']['mean']:.5f}")
    if row["cpu_seconds"] < ours["cpu_seconds"]:
        lines.append(f"- CPU time: {row['label']} {row['cpu_seconds']:.1f} s, {ours['label']} {ours['cpu_seconds']:.1f} s")
    if row["job_seconds"] < ours["job_seconds"]:
        lines.append(
            f"- CPU time of the job: {row['label']} {row['job_seconds']:.1f} s, {ours['label']} {ours['job_seconds']:.1f} s"
        )
    if row["peak_above_imports"] < 2 * ours["peak_above_imports"]:
        mine, theirs = (side["peak_above_imports"] / MIB for side in (ours, row))
        lines.append(f"- memory above imports: {row['label']} {theirs:.0f} MiB, {ours['label']} {mine:.0f} MiB, more than half")
    return lines
