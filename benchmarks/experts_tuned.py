"""What becomes of a mixture that lost half of its experts when the rest are rounded: to nearest, by GPTQ, by AutoRound with so many iterations, from either start, with or without the repair.

    python -m benchmarks.experts_tuned [--rows 32] [--ratio 0.5] [--entrants "gptq" "autoround 200" "autoround 200, from rounding" ...]

The recipe `reap50-autoround-int4-mtp` on the demo checkpoint, on rows of the carried text, but for the step `quantize`. One walk each, in this process; KL(source || release) per token in nats on
held-out documents, with standard errors over documents, differences in pairs to the first entrant, and the MTP head's first drafts that the release accepts. An entrant is `unquantized`, `rtn`,
`gptq` or `autoround N`, with `, from rounding` and `, repaired` behind it where the tuning begins at rounding to nearest, and where `repair: least-squares` is asked for. CPU seconds are those of the walk.

Writes `benchmarks/results/experts-tuned-moe.json`, Markdown on standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.experts import DOCUMENTS, LENGTH, Yardstick
from benchmarks.methods import Overlay, keeper
from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.evaluation.statistics import clustered_mean
from qwench.models import map_of
from qwench.models.place import Place, place_of
from qwench.models.pruned import Pruned
from qwench.recipe import Recipe, parse_recipe
from qwench.steps.calibrate import changes_of, walks_head
from qwench.steps.materials.prepare import prepared
from qwench.steps.planning.plan import make_plan
from qwench.stream.calibration import calibration_rows
from qwench.stream.hidden import HiddenFiles
from qwench.stream.rows import held_out_rows
from qwench.stream.walk import Walk, walk

ROLES = "[attention.*, delta.qkv, delta.z, delta.out, expert.*, shared.*]"
ENTRANTS = ("unquantized", "rtn", "gptq", "autoround 32", "autoround 64", "autoround 200", "autoround 200, from rounding")


def recipe_of(entrant: str, ratio: float, batch: int) -> Recipe:
    """The recipe of an entrant, by its name."""
    method, _, count = entrant.partition(",")[0].partition(" ")
    start = "rounding" if ", from rounding" in entrant else "gptq"
    repair = "least-squares" if ", repaired" in entrant else "none"
    tuning = f"autoround: {{iterations: {count}, batch: {batch}, start: {start}}}, " if count else ""
    step = f"  - quantize: {{method: {method}, {tuning}rules: [{{roles: {ROLES}, scheme: int4}}]}}\n"
    return parse_recipe(
        f"name: t\nsteps:\n  - prune: {{ratio: {ratio}, repair: {repair}}}\n{'' if method == 'unquantized' else step}  - export: {{format: auto-round}}\n",
        entrant,
    )


def released(recipe: Recipe, source: Checkpoint, ids: Tensor, place: Place) -> Overlay:
    """What a release of the recipe would decode to."""
    view = prepared(recipe, source, None)
    plan, values = make_plan(recipe, view, map_of(view)), dict[str, Tensor]()
    target = plan.source
    assert isinstance(target, Pruned)
    with TemporaryDirectory() as folder:
        files = HiddenFiles(Path(folder), (*ids.shape, plan.map.other("embed").shape[1]), torch.bfloat16, len(plan.map.blocks))
        settings = Walk(changes_of(recipe, plan), mtp=walks_head(plan), place=place)
        walk(settings, target.whole, target.whole_map, ids, files, keeper(target, values), lambda *_: None)
    return Overlay(target, values)


def table(entrants: list[str], ratio: float, rows: int, batch: int, place: Place) -> list[dict[str, Any]]:
    folder = checkpoint("moe")
    source = Checkpoint.open(folder)
    ids = calibration_rows(folder, samples=rows, length=LENGTH).ids
    yardstick = Yardstick(source, map_of(source), held_out_rows(folder, DOCUMENTS, LENGTH).ids)
    found, first = list[dict[str, Any]](), None
    for entrant in entrants:
        recipe, started = recipe_of(entrant, ratio, batch), time.process_time()
        target = released(recipe, source, ids, place)
        seconds = time.process_time() - started
        divergence, accepted = yardstick.measure(target)
        first = divergence if first is None else first
        kl, worse = (clustered_mean(values, yardstick.documents) for values in (divergence, divergence - first))
        row = {
            "entrant": entrant, "ratio": ratio, "rows": rows, "compute": place.says[1], "kl": kl.mean, "standard_error": kl.standard_error,
            "minus_first": worse.mean, "minus_first_standard_error": worse.standard_error, "accepted": accepted, "cpu_seconds": round(seconds, 1),
        }  # fmt: skip
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| quantized by | KL, mean ± SE | minus {rows[0]['entrant']}, ± SE | drafts accepted | CPU s |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['entrant']} | {row['kl']:.4f} ± {row['standard_error']:.4f} | {row['minus_first']:+.4f} ± {row['minus_first_standard_error']:.4f} | "
            f"{row['accepted']:.1%} | {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=32, help="calibration rows of 512 tokens")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step of AutoRound")
    parser.add_argument("--compute", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--entrants", nargs="*", default=list(ENTRANTS))
    parser.add_argument("--name", default="experts-tuned-moe", help="of the file in benchmarks/results")
    args = parser.parse_args()
    found = table(args.entrants, args.ratio, args.rows, args.batch, place_of("cpu", args.compute))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"{args.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
