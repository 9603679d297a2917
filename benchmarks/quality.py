"""What each bundled recipe costs on the demo checkpoints: size, divergence, acceptance, readers, time and memory, side by side in one run.

    python -m benchmarks.quality [--models dense moe] [--recipes nvfp4a16 gguf ...] [--engines vllm ...] [--compute bfloat16]

Each release is made by the command line in a process of its own, then measured on the held-out text that the package carries (32 documents of 512 tokens). Recipes
that read rows read 64 of 512 tokens of the carried calibration text, whatever data set they name: the demo checkpoints speak nothing else. AutoRound tunes for 50 steps of
4 rows and not 64 or 200 of 8, which would be hours on a processor; a row says so. A recipe that grafts gets the demo checkpoint without its MTP head for a fine-tune, and the
whole one for a donor.

A recipe is made for a model where it reaches the bulk of its weights: one that names no experts is not measured on a mixture, one that prunes not on a dense model.

The rows go to `benchmarks/results/quality-*.json`, those of recipes that were not asked for stay; `python -m benchmarks.quality_tables` makes the tables of docs/guide of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.errors import EngineError
from qwench.measuring import evaluate_gguf_release, evaluate_release, verify_gguf_release, verify_release
from qwench.recipe import Recipe, bundled, load_recipe
from qwench.result import Acceptance, Evaluation, read_result
from qwench.steps.checks.natural import natural_engine
from qwench.steps.checks.proof import offline

DOCUMENTS, LENGTH = 32, 512
ROWS = ("--calibration", "carried", "--samples", "64", "--length", "512")
TUNED = {"iterations": 50, "batch": 4}
HEADLESS = "name: headless\nsteps:\n  - export: {drop: [mtp]}\n"
PROVED = ("vllm", "sglang")
"""Engines whose loading is played through from the headers; transformers, llama.cpp and the tools that a container comes from are run."""
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Made:
    """A release, and what making it took."""

    folder: Path
    seconds: float
    cpu_seconds: float


def fits(recipe: Recipe, which: str) -> bool:
    """Whether a recipe is meant for the dense or the mixture demo checkpoint."""
    if which == "dense":
        return recipe.prune is None
    return recipe.quantize is None or any(fnmatch("expert.gate", glob) for rule in recipe.quantize.rules for glob in rule.roles)


def make(name: str, which: str, work: Path, compute: str | None) -> Made:
    """A release of a demo checkpoint by a bundled recipe. Raises SystemExit where the command fails."""
    recipe, model, out = load_recipe(name), f"demo:{which}", work / "out" / name
    out.parent.mkdir(exist_ok=True)
    words = ["run", str(_shortened(recipe, work)), "--out", str(out), *(ROWS if recipe.calibrated else ())]
    words += ["--compute", compute] if compute and recipe.calibrated else []
    if recipe.graft:
        words += ["--donor", model]
        model = str(_without_head(model, work))
    started = time.monotonic()
    usage = _qwench(*words, "--model", model)
    return Made(out, time.monotonic() - started, usage.ru_utime + usage.ru_stime)


def _shortened(recipe: Recipe, work: Path) -> str | Path:
    """The recipe's name; where it tunes, the path of the same with fewer steps."""
    if recipe.quantize is None or recipe.quantize.method != "autoround":
        return recipe.name
    data = yaml.safe_load(bundled()[recipe.name])
    quantize = next(step for step in data["steps"] if "quantize" in step)["quantize"]
    quantize["autoround"] = {**quantize["autoround"], **TUNED}
    path = work / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def _without_head(model: str, work: Path) -> Path:
    """What fine-tuning tools leave of a checkpoint: everything but its MTP head."""
    recipe, out = work / "headless.yaml", work / "finetune"
    recipe.write_text(HEADLESS, encoding="utf-8")
    _qwench("run", str(recipe), "--model", model, "--out", str(out))
    return out


def _qwench(*words: str) -> Any:
    """One command, to its end; what it used of the machine."""
    process = subprocess.Popen([sys.executable, "-m", "qwench", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"qwench {' '.join(words)} ended with status {status}")
    return usage


def measure(name: str, which: str, made: Made, engines: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of the table: one for a release of safetensors files, one for each language model of a GGUF release."""
    recipe, quiet, against = load_recipe(name), Report(name, "blocks", None), f"demo:{which}"
    if recipe.gguf:
        ran = {found.file: found.outcome for found in verify_gguf_release(made.folder, "llama.cpp", None, None)}
        for file, found in evaluate_gguf_release(made.folder, against, None, DOCUMENTS, LENGTH, quiet).items():
            fact = next(f for f in read_result(made.folder).files if f.name == file)
            yield row(name, which, made, found, fact.bytes) | {"file": fact.file_type, "readers": {"llama.cpp": ran[file]}}
        return
    found = evaluate_release(made.folder, against, None, DOCUMENTS, LENGTH, quiet)
    readers = {
        engine: "loads by its rules" if offline(made.folder, engine).good else "refused by its rules" for engine in PROVED
    }
    ran = dict.fromkeys(("transformers", natural_engine(made.folder), *engines))
    readers |= {engine: _verified(made.folder, engine) for engine in ran}
    yield row(name, which, made, found, read_result(made.folder).bytes) | {"readers": readers}


def _verified(folder: Path, engine: str) -> str:
    """What came of loading a release in an engine."""
    try:
        return verify_release(folder, engine).outcome
    except EngineError as error:
        return str(error).splitlines()[0]


def row(name: str, which: str, made: Made, found: Evaluation, nbytes: int) -> dict[str, Any]:
    """What was measured of one release or file."""
    result = read_result(made.folder)
    calibration = result.calibration
    return {
        "recipe": name, "model": which, "bytes": nbytes, "share": round(nbytes / _source_bytes(which), 4),
        "kl_mean": found.divergence.mean.mean, "kl_standard_error": found.divergence.mean.standard_error,
        "kl_p999": found.divergence.p999, "top1": found.top1_agreement.mean,
        "perplexity_source": found.perplexity_source.mean, "perplexity_release": found.perplexity_release.mean,
        "acceptance_1_source": _first(found.acceptance_source), "acceptance_1_release": _first(found.acceptance_release),
        "tuning": f"{TUNED['iterations']} steps of {TUNED['batch']} rows" if "autoround" in name else None,
        "rows": f"{calibration.rows} of {calibration.length}" if calibration else None,
        "compute": result.run.compute, "wall_seconds": round(made.seconds, 1), "cpu_seconds": round(made.cpu_seconds, 1),
        "peak_rss_mib": round(result.run.peak_rss / 2**20),
    }  # fmt: skip


def _source_bytes(which: str) -> int:
    return sum(path.stat().st_size for path in checkpoint(which).glob("*.safetensors"))  # type: ignore[arg-type]


def _first(side: Acceptance | None) -> float | None:
    return side.by_position[0].mean if side and side.by_position else None


def keep(which: str, name: str, rows: list[dict[str, Any]]) -> None:
    """Put the rows of a recipe in the place of those that were there."""
    path = RESULTS / f"quality-{which}.json"
    others = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    every = sorted([r for r in others if r["recipe"] in bundled() and r["recipe"] != name] + rows, key=lambda r: r["recipe"])
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=["dense", "moe"], default=["dense", "moe"])
    parser.add_argument("--recipes", nargs="*", choices=sorted(bundled()), default=sorted(bundled()))
    parser.add_argument("--engines", nargs="*", default=[], help="that read the releases besides transformers and llama.cpp")
    parser.add_argument("--compute", help="what calibrated recipes compute in; left out, what suits the device")
    args = parser.parse_args()
    for which in args.models:
        for name in args.recipes:
            if not fits(load_recipe(name), which):
                continue
            with tempfile.TemporaryDirectory() as work:
                rows = list(measure(name, which, make(name, which, Path(work), args.compute), args.engines))
            keep(which, name, rows)
            for found in rows:
                print(
                    f"{which} {name} {found.get('file', '')}: KL {found['kl_mean']:.5f}, {found['wall_seconds']} s", flush=True
                )


if __name__ == "__main__":
    main()
