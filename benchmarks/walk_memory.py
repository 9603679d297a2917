"""What a plan says of a calibrated run's memory, beside what the run takes.

    python -m benchmarks.walk_memory [--experts 32] [--hidden 1024] [--width 512] [--rows 8] [--length 256] [--recipes gptq autoround ...]

A random mixture of experts of two layers (one of each kind) and an MTP head, wide enough that its layers, and not the interpreter, decide. Each recipe runs in a process of its own; measured is the program's
high-water mark above what it held with its libraries imported. Few iterations: they change the time and not the memory.

Writes `benchmarks/results/walk-memory.json`, Markdown on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers.running import ENVIRONMENT, WORKERS
from benchmarks.scale import cut, make_checkpoint
from qwench.checkpoint.reader import Checkpoint
from qwench.models import map_of
from qwench.recipe import load_recipe
from qwench.steps.materials.prepare import prepared
from qwench.steps.planning.plan import make_plan
from qwench.stream.calibration import calibration_rows

CONFIG = Path(__file__).parents[1] / "tests" / "data" / "configs" / "qwen3.5-35b-a3b.json"
ROLES = ["attention.*", "delta.qkv", "delta.z", "delta.out", "expert.*", "shared.*"]
MIB = 2**20


def steps_of(name: str) -> list[dict[str, Any]]:
    """The steps of a recipe by name: words joined by `+`."""
    scheme, method, found = "int4", "rtn", list[dict[str, Any]]()
    settings: dict[str, Any] = {}
    for word in name.split("+"):
        if word == "reap":
            found.append({"prune": {"ratio": 0.5}})
        elif word == "repaired":
            found[-1]["prune"]["repair"] = "least-squares"
        elif word == "awq":
            found.append({"smooth": {"folds": ["norm.post", "expert.up", "shared.up"], "grid": 4, "clip": True}})
        elif word == "w4a4":
            scheme = "nvfp4-w4a4"
        elif word == "eora":
            settings["correct"] = True
        elif word != "rtn":
            method = word.partition("-")[0]
            settings["start"] = "rounding" if word.endswith("-rounding") else "gptq"
    told = {"autoround": {"iterations": 3, "batch": 4, "start": settings["start"]}} if method == "autoround" else {}
    if name not in ("reap", "reap+repaired"):
        found.append({"quantize": {"method": method, **told, "rules": [{"roles": ROLES, "scheme": scheme}]}})
    return found + [{"correct": {"rank": 64}}] * ("correct" in settings) + [{"export": {"format": "compressed-tensors"}}]


def random_mixture(args: argparse.Namespace, folder: Path) -> None:
    config = cut(json.loads(CONFIG.read_text(encoding="utf-8")), 4)
    text = config["text_config"]
    text |= {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2, "num_experts": args.experts,
        "hidden_size": args.hidden, "moe_intermediate_size": args.width, "shared_expert_intermediate_size": args.width, "vocab_size": 2048,
    }  # fmt: skip
    for key in [key for key in config if key.startswith("vision") or key.endswith("token_id")]:
        config.pop(key)
    make_checkpoint({**text, "architectures": ["Qwen3_5MoeForCausalLM"]} if args.text else config, folder)


def measured(name: str, model: Path, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One recipe: what its plan says, and what it takes."""
    work.mkdir()
    recipe = {
        "name": "t",
        "acceptance": "off",
        "calibration": {"samples": args.rows, "length": args.length},
        "steps": steps_of(name),
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    loaded = load_recipe(str(work / "recipe.yaml"))
    source = prepared(loaded, Checkpoint.open(model), None)
    planned = make_plan(loaded, source, map_of(source)).working_memory
    rows = calibration_rows(model, samples=args.rows, length=args.length).ids.tolist()
    (work / "rows.json").write_text(json.dumps({"ids": rows}), encoding="utf-8")
    job = {
        "model": str(model),
        "out": str(work / "release"),
        "rows": str(work / "rows.json"),
        "method": name,
        "settings": {"recipe": str(work / "recipe.yaml")},
    }
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    with (work / "log.txt").open("wb") as log:
        done = subprocess.run(
            [sys.executable, str(WORKERS / "qwench_worker.py"), str(work)],
            env={**os.environ, **ENVIRONMENT},
            stdout=log,
            stderr=log,
            check=False,
        )
    if done.returncode:
        raise SystemExit((work / "log.txt").read_text(encoding="utf-8", errors="replace")[-800:])
    took = json.loads((work / "report.json").read_text(encoding="utf-8"))
    peak = took["peak"] - took["resident_after_imports"]
    return {
        "recipe": name,
        "rows": args.rows,
        "length": args.length,
        "planned": planned,
        "measured": peak,
        "ratio": round(planned / peak, 3),
        "cpu_seconds": round(took["job_seconds"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--text", action="store_true", help="a text-only layout, experts fused all the same")
    parser.add_argument(
        "--recipes",
        nargs="*",
        default=["reap", "reap+repaired", "gptq", "awq", "autoround-rounding", "autoround", "reap+autoround", "w4a4"],
    )
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        random_mixture(args, Path(scratch) / "model")
        for number, name in enumerate(args.recipes):
            found.append(measured(name, Path(scratch) / "model", Path(scratch) / str(number), args))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "walk-memory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("| recipe | rows | planned, MiB | measured, MiB | planned / measured |\n|---|---|--:|--:|--:|")
    for row in found:
        print(
            f"| {row['recipe']} | {row['rows']} x {row['length']} | {row['planned'] / MIB:.0f} | {row['measured'] / MIB:.0f} | {row['ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
