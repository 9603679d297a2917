"""What each recipe costs on the demo checkpoints: size, divergence, acceptance, time and memory, side by side in one run.

    python -m benchmarks.quality [--models dense moe] [--recipes nvfp4a16 int4 ...]

Each release is made by the command line in a process of its own, then measured on the held-out text that the package carries (32 documents of 512 tokens). The table
goes to `benchmarks/results/quality-*.json` and, as Markdown, to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qwench.demo import checkpoint
from qwench.recipe import bundled, load_recipe
from qwench.result import read_result
from qwench.steps.evaluate import evaluate
from qwench.stream.rows import held_out_rows

DOCUMENTS, LENGTH = 32, 512


def measure(recipe: str, which: str, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    model, out = checkpoint(which), folder / recipe  # type: ignore[arg-type]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "qwench", "run", recipe, "--model", str(model), "--out", str(out)], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{recipe} on {which} ended with status {status}")
    wall = time.monotonic() - started
    result, found = read_result(out), evaluate(out, model, held_out_rows(model, DOCUMENTS, LENGTH))
    accepted = [side.by_position[0].mean if side else None for side in (found.acceptance_source, found.acceptance_release)]
    return {
        "recipe": recipe, "model": which, "bytes": result.bytes, "share": round(result.bytes / result.source.bytes, 4),
        "kl_mean": found.divergence.mean.mean, "kl_standard_error": found.divergence.mean.standard_error,
        "kl_p999": found.divergence.p999, "top1": found.top1_agreement.mean,
        "perplexity_source": found.perplexity_source.mean, "perplexity_release": found.perplexity_release.mean,
        "acceptance_1_source": accepted[0], "acceptance_1_release": accepted[1],
        "wall_seconds": round(wall, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_mib": round(result.run.peak_rss / 2**20),
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | recipe | size | of source | KL, mean ± SE (nats) | p99.9 | top-1 | MTP acceptance 1, source / release |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        accepted = f"{r['acceptance_1_source']:.3f} / {r['acceptance_1_release']:.3f}"
        kl = f"{r['kl_mean']:.5f} ± {r['kl_standard_error']:.5f}"
        lines.append(
            f"| {r['model']} | `{r['recipe']}` | {r['bytes'] / 1e6:.2f} MB | {r['share']:.1%} | {kl} | {r['kl_p999']:.3f} | {r['top1']:.2%} | {accepted} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=["dense", "moe"], default=["dense", "moe"])
    parser.add_argument("--recipes", nargs="*", default=sorted(name for name in bundled() if not load_recipe(name).gguf))
    args = parser.parse_args()
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    every: list[dict[str, Any]] = []
    for which in args.models:
        with tempfile.TemporaryDirectory() as folder:
            fitting = [recipe for recipe in args.recipes if which == "moe" or not load_recipe(recipe).prune]
            rows = [measure(recipe, which, Path(folder)) for recipe in fitting]
        (results / f"quality-{which}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        every += rows
    print(markdown(every))


if __name__ == "__main__":
    main()
