"""Pruning and tuning a mixture of experts in one walk, and in two passes: half of the experts left out by REAP, the rest INT4 by AutoRound, as `reap50-autoround-int4-mtp` has it.

    make engines                                             # llm-compressor and auto-round: once
    python -m benchmarks.one_walk [--rows 16] [--iterations 32] [--batch 4] [--work DIR]

One walk; the same two steps as two runs of ours, the second on the folder of the first; and what users of other tools do: llm-compressor's REAP modifier, then auto-round on its folder. The same
calibration ids, iterations, bits and groups; a process of its own for each pass, one thread; the MTP head is measured by nobody. Further pairs, without a peer: pruning and rounding to
nearest, pruning and GPTQ; and one walk with a third of the iterations, since one walk tunes against the layers with all their experts and needs fewer. Tuning starts from GPTQ's codes, as the recipe's does. Times of two passes are sums, their memory is the larger one. `read`: bytes of weights that the passes read.

Writes `benchmarks/results/one-walk-moe.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.__main__ import machine, written_rows
from benchmarks.peers.entrants import OURS, ROUTERS_KEPT, Entrant
from benchmarks.peers.judging import Judge, Judgement
from benchmarks.peers.running import Run, run
from qwench.demo import checkpoint
from qwench.stream.rows import held_out_rows

RATIO = 0.5
MIB = 2**20


@dataclass(frozen=True)
class Way:
    """A way to make the release.

    Attributes:
        what: which release.
        how: for the table.
        passes: entrants in order, each on what the one before it left.
    """

    what: str
    how: str
    passes: tuple[Entrant, ...]


def _ours(name: str, method: str, prune: bool, tuned: bool, after: str | None = None, **settings: Any) -> Entrant:
    told = {"format": "auto-round", **({"prune": {"ratio": RATIO}} if prune else {}), **settings}
    if method == "prune":
        told["format"] = "compressed-tensors"
    return Entrant(name, OURS, "-" if method == "prune" else "C", method, told, models=("moe",), tuned=tuned, after=after)


def ways(compute: str, iterations: int) -> list[Way]:
    """Every way, ours in the given numbers."""
    numbers = {"compute": compute}
    first = _ours(f"pruned-{compute}", "prune", True, True, **numbers)
    found: list[Way] = []
    tuned = (
        (f"autoround{label}", {"autoround": {"start": start}})
        for start, label in (("gptq", ""), ("rounding", ", from rounding"))
    )
    for what, told in (("rtn", {}), ("gptq", {}), *tuned):
        method, _, start = what.partition(", from ")
        name = f"{method}{start and '-from-'}{start}-{compute}"
        one = _ours(f"one-{name}", method, True, True, **told, **numbers)
        second = _ours(f"two-{name}", method, False, True, after=first.name, **told, **numbers)
        found += [
            Way(what, f"qwench, one walk, {compute}", (one,)),
            Way(what, f"qwench, two passes, {compute}", (first, second)),
        ]
    few = _ours(
        f"one-autoround-few-{compute}",
        "autoround",
        True,
        True,
        autoround={"iterations": max(1, iterations // 3), "start": "gptq"},
        **numbers,
    )
    return [*found, Way("autoround", f"qwench, one walk, {iterations // 3} iterations, {compute}", (few,))]


def theirs() -> Way:
    pruned = Entrant("llm-compressor-pruned", "llm-compressor", "-", "reap", {"ratio": RATIO}, models=("moe",), tuned=True)
    tuned = Entrant(
        "auto-round-after", "auto-round", "C", "w4a16", {"kept": ROUTERS_KEPT}, models=("moe",), tuned=True, after=pruned.name
    )
    return Way("autoround", "llm-compressor, then auto-round", (pruned, tuned))


def taken(runs: Sequence[Run], folders: Sequence[Path]) -> dict[str, Any]:
    """What passes took together."""
    read = [checkpoint("moe"), *folders[:-1]]
    return {
        "passes": len(runs), "cpu_seconds": sum(r.cpu_seconds for r in runs), "job_seconds": sum(r.job_seconds for r in runs),
        "wall_seconds": sum(r.wall_seconds for r in runs), "peak_above_imports": max(r.peak - r.resident_after_imports for r in runs),
        "by_pass": [round(r.job_seconds, 1) for r in runs], "read": sum(p.stat().st_size for folder in read for p in folder.glob("*.safetensors")),
        "versions": {name: version for r in runs for name, version in r.versions.items()},
    }  # fmt: skip


def compare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    told = written_rows("moe", args.rows, args.length, args.iterations, args.batch, work)
    judge = Judge(checkpoint("moe"), held_out_rows(checkpoint("moe"), args.held, args.length).ids)
    rows, found = list[dict[str, Any]](), dict[str, Judgement]()
    chosen = [
        way for compute in args.compute for way in ways(compute, args.iterations) if not args.only or way.what in args.only
    ] + [theirs()]
    for way in chosen:
        runs = [run(entrant, "moe", told, work / entrant.name, args.timeout) for entrant in way.passes]
        failed = next((r.why_not for r in runs if r.why_not), None)
        row: dict[str, Any] = {"what": way.what, "how": way.how, "why_not": failed}
        if failed is None:
            folders = [work / entrant.name / "release" for entrant in way.passes]
            judgement = judge.judge(folders[-1])
            row |= {
                **taken(runs, folders),
                "kl": judgement.kl._asdict(),
                "head": judgement.head,
                "accepted": judgement.acceptance and judgement.acceptance.mean,
            }
            base = found.setdefault(way.what, judgement)
            row["minus_first"] = judge.difference(judgement, base)._asdict()
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return {
        "rows": args.rows, "length": args.length, "iterations": args.iterations, "batch": args.batch, "held": args.held,
        "acceptance_source": judge.acceptance.mean, "machine": machine(), "ways": rows,
    }  # fmt: skip


def markdown(record: dict[str, Any]) -> str:
    lines = [
        "# Pruning and quantizing: one walk, two passes",
        "",
        f"Demo mixture, half of its 12 experts left out by REAP, all linear layers of the text INT4, groups of 128. {record['rows']} rows of {record['length']} tokens; AutoRound: {record['iterations']} iterations of {record['batch']} rows. "
        f"KL on {record['held']} held-out documents, differences in pairs to the first line of each kind. Source: {record['acceptance_source']:.3f} of the head's first drafts accepted. One thread, {record['machine']}.",
        "",
        "| then | how | KL ± SE | minus first | MTP draft 1 | CPU s of the jobs (by pass) | CPU s, interpreter and imports too | wall s | MiB above imports | weights read, MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in record["ways"]:
        if row["why_not"]:
            lines.append(f"| {row['what']} | {row['how']} | {row['why_not']} |" + " |" * 7)
            continue
        kl, pair = row["kl"], row["minus_first"]
        accepted = f"{row['accepted']:.3f}" if row["accepted"] is not None else row["head"].split(":")[0]
        lines.append(
            f"| {row['what']} | {row['how']} | {kl['mean']:.4f} ± {kl['standard_error']:.4f} | {pair['mean']:+.4f} ± {pair['standard_error']:.4f} | {accepted} | "
            f"{row['job_seconds']:.1f} ({' + '.join(map(str, row['by_pass']))}) | {row['cpu_seconds']:.1f} | {row['wall_seconds']:.0f} | {row['peak_above_imports'] / MIB:.0f} | {row['read'] / 1e6:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--held", type=int, default=32)
    parser.add_argument("--compute", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="*", help="of: rtn, gptq, autoround, 'autoround, from rounding'")
    parser.add_argument("--timeout", type=float, default=3600.0)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        record = compare(args, work)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "one-walk-moe.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (results / "one-walk-moe.md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))


if __name__ == "__main__":
    main()
