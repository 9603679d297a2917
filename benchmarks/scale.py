"""Time and memory of a release at the published sizes, beside the time to copy the same bytes on the same disk in the same run.

    python -m benchmarks.scale CONFIG.json --recipe nvfp4a16 --work DIR [--layers N]

makes a random checkpoint of the shape that CONFIG describes (in several shards), runs the recipe on it in a process of its own, and reads and writes
just as many bytes with plain reads and writes. A recipe that reads rows gets `--samples` of `--length` tokens of the text that the package carries, cut by
the demo checkpoint's tokenizer: random weights know no language, but take as long. `--layers` cuts the depth, not the widths. Files are dropped from the page cache before each
phase. The figures go to `benchmarks/results/` as JSON, with the machine they were taken on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from qwench.checkpoint.sidecars import sidecars_of
from qwench.checkpoint.source import TensorSpec
from qwench.checkpoint.writer import CheckpointWriter, FileLayout
from qwench.demo import checkpoint
from qwench.models import sketch
from qwench.recipe import load_recipe
from qwench.result import read_result

SHARD = 5_000_000_000
POOL = 1 << 24
BUFFER = 16 << 20


def cut(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The config at a smaller depth, its layer pattern kept."""
    if layers is not None:
        text = config["text_config"]
        text["num_hidden_layers"] = layers
        text["layer_types"] = text["layer_types"][:layers]
    return config


def make_checkpoint(config: dict[str, Any], folder: Path) -> int:
    """Random weights of the published layout. Returns their bytes."""
    source = sketch(config)
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(9)) * 0.02).to(torch.bfloat16)
    groups: list[list[TensorSpec]] = [[]]
    for spec in source.tensors.values():
        if sum(t.nbytes for t in groups[-1]) + spec.nbytes > SHARD and groups[-1]:
            groups.append([])
        groups[-1].append(TensorSpec(spec.name, spec.dtype, spec.shape))
    files = [FileLayout(f"model-{n:05d}-of-{len(groups):05d}.safetensors", tuple(g)) for n, g in enumerate(groups, start=1)]
    with CheckpointWriter(folder, files, fingerprint="random") as writer:
        for offset, spec in enumerate(t for f in files for t in f.tensors):
            count = torch.Size(spec.shape).numel()
            repeats = -(-(count + offset % 997) // POOL)
            writer.write(spec.name, pool.repeat(repeats)[offset % 997 : offset % 997 + count].view(spec.shape))
        tokenizer = {name: path for name, path in sidecars_of(checkpoint("dense")).items() if name.startswith("tokenizer")}
        writer.commit({"config.json": json.dumps(config).encode(), **tokenizer})
    return sum(t.nbytes for f in files for t in f.tensors)


def drop_from_cache(folder: Path) -> None:
    """Write back and forget the pages of every file, so that each phase reads from the disk."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def copy_bytes(source: Path, out: Path, written: int) -> float:
    """Seconds to read every weight file of `source` and to write `written` bytes, with plain reads and writes and one fsync."""
    drop_from_cache(source)
    started = time.monotonic()
    left = written
    with out.open("wb", buffering=0) as sink:
        for path in sorted(source.glob("*.safetensors")):
            with path.open("rb", buffering=0) as stream:
                while block := stream.read(BUFFER):
                    if left > 0:
                        left -= sink.write(block[:left])
        os.fsync(sink.fileno())
    seconds = time.monotonic() - started
    out.unlink()
    return seconds


def run_recipe(recipe: str, model: Path, out: Path, rows: list[str]) -> dict[str, Any]:
    """The release, made by the command line in a process of its own, and what the kernel says about that process."""
    drop_from_cache(model)
    started = time.monotonic()
    command = [sys.executable, "-m", "qwench", "run", recipe, "--model", str(model), "--out", str(out), "--accept-any", *rows]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"qwench run ended with status {status}")
    return {
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gib": round(read_result(out).run.peak_rss / 2**30, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--recipe", default="nvfp4a16")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--keep", action="store_true", help="leave the random checkpoint for another run")
    args = parser.parse_args()

    config = cut(json.loads(args.config.read_text(encoding="utf-8")), args.layers)
    model, out = args.work / "model", args.work / "release"
    args.work.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        make_checkpoint(config, model)
    source_bytes = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    shutil.rmtree(out, ignore_errors=True)
    calibrated = load_recipe(args.recipe).calibrated
    rows = ["--calibration", "carried", "--samples", str(args.samples), "--length", str(args.length)] if calibrated else []
    measured = run_recipe(args.recipe, model, out, rows)
    release_bytes = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    shutil.rmtree(out)
    copy_seconds = copy_bytes(model, args.work / "copy.bin", release_bytes)
    if not args.keep:
        shutil.rmtree(model)
    report = {
        "config": args.config.stem if args.config.stem != "config" else args.config.parent.name, "layers": config["text_config"]["num_hidden_layers"], "recipe": args.recipe,
        **({"samples": args.samples, "length": args.length} if calibrated else {}),
        "source_bytes": source_bytes, "release_bytes": release_bytes, **measured,
        "copy_seconds": round(copy_seconds, 1), "ratio_to_copy": round(measured["wall_seconds"] / copy_seconds, 2),
        "cores": len(os.sched_getaffinity(0)), "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"scale-{report['config']}-{report['layers']}l-{args.recipe}.json").write_text(
        json.dumps(report, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
