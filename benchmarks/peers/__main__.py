"""Qwench and other quantizers on a demo checkpoint, side by side.

    make engines                                                        # llm-compressor, GPTQModel, auto-round: once
    python -m benchmarks.peers --model demo:dense --sets A,B,C --rows 64 --length 512

Entrants run one after the other, each in a process of its own. `--work DIR` keeps what they made, and a second call takes over what is there: an entrant is run again where its job has
changed or its folder was deleted. The table goes to `benchmarks/results/peers-MODEL.json` and `.md`.

GPTQModel compiles a part of itself when it is first used, which takes minutes; the first run with a fresh environment counts them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers.entrants import ENTRANTS, Entrant, chosen
from benchmarks.peers.judging import Judge, Judgement, opens
from benchmarks.peers.recipes import SETS, Model
from benchmarks.peers.running import Calibration, Run, run
from benchmarks.peers.table import markdown
from qwench.demo import checkpoint
from qwench.errors import UserError
from qwench.stream.calibration import calibration_rows
from qwench.stream.rows import held_out_rows

RESULTS = Path(__file__).parents[1] / "results"


def written_rows(model: Model, rows: int, length: int, iterations: int, batch: int, work: Path) -> Calibration:
    """The calibration rows as a file that every worker reads."""
    found = calibration_rows(checkpoint(model), samples=rows, length=length)
    path = work / f"rows-{rows}x{length}.json"
    told = {"text": found.text, "ids_sha256": found.ids_sha256, "ids": found.ids.tolist()}
    path.write_text(json.dumps(told) + "\n", encoding="utf-8")
    return Calibration(path, rows, length, iterations, batch)


def line(entrant: Entrant, took: Run) -> dict[str, Any]:
    """What is known of an entrant before anybody looks at what it made."""
    label = f"{entrant.who} {entrant.name.removeprefix(entrant.who).strip('-') or entrant.method}"
    return {
        "name": entrant.name, "label": label, "who": entrant.who, "weights": entrant.weights, "rival": entrant.rival,
        **asdict(took),
        "peak_above_imports": took.peak - took.resident_after_imports,
    }  # fmt: skip


def judged(row: dict[str, Any], folder: Path, judge: Judge, timeout: float | None) -> Judgement | None:
    """Add to a line what the entrant's folder is worth; None where it cannot be read, and the line says why."""
    try:
        found = judge.judge(folder)
        row |= {"opens": opened_once(folder, timeout)} if timeout else {}
    except UserError as error:
        row["why_not"] = f"made a folder that we cannot read: {' '.join(str(error).split())}"
        return None
    row |= {"kl": found.kl._asdict(), "top1": found.top1._asdict(), "head": found.head, "bytes": found.bytes}
    row["acceptance"] = found.acceptance._asdict() if found.acceptance else None
    return found


def opened_once(folder: Path, timeout: float) -> str:
    """What the engine says to a folder; asked once, kept beside it like what the run took."""
    kept = folder.with_name("opens.txt")
    if not kept.is_file():
        kept.write_text(opens(folder, timeout), encoding="utf-8")
    return kept.read_text(encoding="utf-8")


def compare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All entrants: run, judge, pair."""
    model: Model = args.model
    plain = written_rows(model, args.rows, args.length, args.iterations, args.batch, work)
    tuned = written_rows(model, args.tuned_rows, args.length, args.iterations, args.batch, work)
    judge = Judge(checkpoint(model), held_out_rows(checkpoint(model), args.held, args.length).ids)
    rows, found = list[dict[str, Any]](), dict[str, Judgement]()
    for entrant in chosen(model, args.sets, args.only):
        folder = work / entrant.name
        took = run(entrant, model, tuned if entrant.tuned else plain, folder, args.timeout)
        rows.append(row := line(entrant, took))
        if took.why_not is None and (judgement := judged(row, folder / "release", judge, args.timeout if args.open else None)):
            found[entrant.name] = judgement
        print(json.dumps({key: value for key, value in row.items() if key != "reports"}), file=sys.stderr, flush=True)
    for row in rows:
        if row["name"] in found and row["rival"] in found:
            row["minus_rival"] = judge.difference(found[row["name"]], found[row["rival"]])._asdict()
    numbers = {"rows": args.rows, "length": args.length}
    return {
        "model": model, "calibration": numbers, "tuned": {"rows": args.tuned_rows, "iterations": args.iterations, "batch": args.batch},
        "held_documents": args.held, "length": args.length, "acceptance_source": judge.acceptance.mean, "machine": machine(), "entrants": rows,
    }  # fmt: skip


def machine() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(text.partition(":")[2].strip() for text in lines if text.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=_model, default="dense", metavar="demo:dense|demo:moe")
    parser.add_argument("--sets", type=_sets, default=list(SETS), help=f"comma-separated, of {', '.join(SETS)}")
    parser.add_argument("--only", type=_names, default=[], help="comma-separated names of entrants")
    parser.add_argument("--rows", type=int, default=64, help="calibration rows")
    parser.add_argument("--length", type=int, default=512, help="tokens in each row, of calibration and of held-out text")
    parser.add_argument(
        "--tuned-rows", type=int, default=16, help="calibration rows of tuned methods: the first of the others'"
    )
    parser.add_argument("--iterations", type=int, default=200, help="of tuned methods, on both sides")
    parser.add_argument("--batch", type=int, default=8, help="of tuned methods, on both sides")
    parser.add_argument("--held", type=int, default=32, help="held-out documents")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one entrant")
    parser.add_argument("--work", type=Path, help="where releases are kept; a temporary folder by default")
    parser.add_argument(
        "--no-open", dest="open", action="store_false", help="do not open each release in the engine that it is for"
    )
    parser.add_argument("--name", help="of the files in benchmarks/results: peers-NAME; the model by default")
    return parser.parse_args()


def _model(text: str) -> str:
    which = text.removeprefix("demo:")
    if which not in ("dense", "moe"):
        raise argparse.ArgumentTypeError("demo:dense or demo:moe")
    return which


def _sets(text: str) -> list[str]:
    return _known(text, list(SETS))


def _names(text: str) -> list[str]:
    return _known(text, [entrant.name for entrant in ENTRANTS])


def _known(text: str, known: list[str]) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if strange := [word for word in words if word not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(strange)} unknown; known are {', '.join(known)}")
    return words


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        record = compare(args, work)
    RESULTS.mkdir(exist_ok=True)
    name = f"peers-{args.name or args.model}"
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = markdown(record)
    (RESULTS / f"{name}.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
