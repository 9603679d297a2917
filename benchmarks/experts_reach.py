"""Statistics of experts on the tokens that the router sends to them, or on all tokens (`calibration: {experts: all}`): which makes the better release, with many calibration rows and with few.

    python -m benchmarks.experts_reach [--rows 2 4 16 64] [--length 128] [--methods gptq awq w4a4 ...]

The demo mixture, 12 experts, 4 a token; routed and shared experts of all layers are quantized. gptq: INT4, group 128. awq: the same, rounded to nearest behind the folds norm.post, expert.up and shared.up, and clipping.
w4a4: NVFP4 weights to nearest and NVFP4 inputs, each expert with a range of its own; w4a4 shared: one range for all. Calibrated on rows of the carried text; KL(source || release) per token in nats on held-out
documents, standard errors over documents, differences (all less routed) in pairs. `too few`: sets that saw fewer than the 128 tokens that GPTQ wants, and were rounded to nearest. CPU seconds are those of the walk.

Writes `benchmarks/results/experts-reach-moe.json`, Markdown on standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods import Overlay, keeper
from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import TensorSource
from qwench.demo import checkpoint
from qwench.evaluation.divergence import measure_tokens
from qwench.evaluation.statistics import clustered_mean
from qwench.models import map_of
from qwench.models.place import Place, place_of
from qwench.models.run import Trunk
from qwench.numerics import InputRounding
from qwench.recipe import Recipe, parse_recipe
from qwench.steps.calibrate import changes_of, reach_of
from qwench.steps.planning.plan import make_plan
from qwench.stream.calibration import calibration_rows
from qwench.stream.hidden import HiddenFiles
from qwench.stream.live import LiveBlock
from qwench.stream.rows import held_out_rows
from qwench.stream.walk import Walk, walk

HELD, DOCUMENTS = 512, 16
ROLES = "[expert.*, shared.gate, shared.up, shared.down]"
METHODS = {
    "gptq": f"  - quantize: {{method: gptq, rules: [{{roles: {ROLES}, scheme: int4}}]}}\n",
    "awq": f"  - smooth: {{folds: [norm.post, expert.up, shared.up], clip: true}}\n  - quantize: {{rules: [{{roles: {ROLES}, scheme: int4}}]}}\n",
    "w4a4": f"  - quantize: {{activations: {{experts: own}}, rules: [{{roles: {ROLES}, scheme: nvfp4-w4a4}}]}}\n",
    "w4a4 shared": f"  - quantize: {{rules: [{{roles: {ROLES}, scheme: nvfp4-w4a4}}]}}\n",
}


class Rounded(Overlay):
    """A checkpoint in which some tensors hold other values, and some inputs are rounded."""

    def __init__(self, source: TensorSource, values: Mapping[str, Tensor], rounded: Mapping[str, InputRounding]) -> None:
        super().__init__(source, values)
        self.rounded = rounded

    def input_rounding(self, module: str) -> InputRounding | None:
        return self.rounded.get(module)


def recipe_of(method: str, reach: str) -> Recipe:
    return parse_recipe(
        f"name: t\ncalibration: {{experts: {reach}}}\nsteps:\n{METHODS[method]}  - export: {{format: compressed-tensors}}\n",
        method,
    )


def released(recipe: Recipe, source: Checkpoint, ids: Tensor, place: Place) -> tuple[Rounded, list[str]]:
    """What a release of the recipe would decode to, and what its methods said."""
    plan, values, rounded = make_plan(recipe, source, map_of(source)), dict[str, Tensor](), dict[str, InputRounding]()
    keep = keeper(source, values)

    def emit(live: LiveBlock) -> None:
        keep(live)
        rounded.update(live.rounded)

    settings = Walk(changes_of(recipe, plan), place=place, reach=reach_of(recipe))
    with TemporaryDirectory() as folder:
        files = HiddenFiles(Path(folder), (*ids.shape, plan.map.other("embed").shape[1]), torch.bfloat16, len(plan.map.blocks))
        walk(settings, source, plan.map, ids, files, emit, lambda *_: None)
    return Rounded(source, values, rounded), [
        says for change in settings.changes for says in getattr(change, "reports", {}).values()
    ]


def table(methods: list[str], counts: list[int], length: int, place: Place) -> list[dict[str, Any]]:
    folder = checkpoint("moe")
    source = Checkpoint.open(folder)
    trunk, held = Trunk(source, map_of(source)), held_out_rows(folder, DOCUMENTS, HELD).ids
    normed, documents = trunk.forward(held), torch.arange(len(held)).repeat_interleave(HELD - 1)
    found: list[dict[str, Any]] = []
    for method in methods:
        for rows in counts:
            ids, divergences = calibration_rows(folder, samples=rows, length=length).ids, dict[str, Tensor]()
            row: dict[str, Any] = {"method": method, "rows": rows, "length": length, "compute": place.says[1]}
            for reach in ("routed", "all"):
                started = time.process_time()
                target, says = released(recipe_of(method, reach), source, ids, place)
                seconds = time.process_time() - started
                changed = Trunk(target, trunk.map)
                divergences[reach] = measure_tokens(
                    normed, changed.forward(held), trunk.logits, trunk.logits, held, trunk.vocabulary
                ).divergence
                kl = clustered_mean(divergences[reach], documents)
                row[reach] = {
                    "kl": kl.mean, "standard_error": kl.standard_error, "cpu_seconds": round(seconds, 1),
                    "too_few": sum("tokens were seen" in said for said in says),
                }  # fmt: skip
            difference = clustered_mean(divergences["all"] - divergences["routed"], documents)
            found.append(row | {"difference": difference.mean, "difference_standard_error": difference.standard_error})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | rows | routed: KL ± SE | too few | CPU s | all: KL ± SE | CPU s | all less routed, ± SE |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        routed, every = row["routed"], row["all"]
        lines.append(
            f"| {row['method']} | {row['rows']} | {routed['kl']:.5f} ± {routed['standard_error']:.5f} | {routed['too_few']} | {routed['cpu_seconds']} | "
            f"{every['kl']:.5f} ± {every['standard_error']:.5f} | {every['cpu_seconds']} | {row['difference']:+.5f} ± {row['difference_standard_error']:.5f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", type=int, default=[2, 4, 16, 64], help="calibration rows")
    parser.add_argument("--length", type=int, default=128, help="tokens in each")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--compute", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    found = table(args.methods, args.rows, args.length, place_of("cpu", args.compute))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "experts-reach-moe.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
