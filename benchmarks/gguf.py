"""The quality ladder of GGUF: every type on the demo checkpoints, with and without importance: size, divergence, acceptance of the MTP head.

    python -m benchmarks.gguf [--models dense moe] [--types BF16 Q8_0 ...] [--documents 16] [--length 256] [--engine]

Importance comes from rows of the carried calibration text; held-out text is what is measured on. Every file is written, decoded by our own reader and computed in float32, so that
the numbers are those of the weights alone; with `--engine` llama.cpp's own reading is beside it: its divergence from the source, and what it counts of drafts.
Whether importance helps is judged token by token, both files on the same rows: the difference of their divergences with its own standard error.
The table goes to `benchmarks/results/gguf-*.json` and `gguf-*.md`, and to standard output.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.engines import ENGINES, Request
from qwench.evaluation.divergence import TokenMeasures, measure_tokens
from qwench.evaluation.statistics import clustered_mean
from qwench.formats.gguf import plan_gguf
from qwench.formats.gguf_importance import Importance, importance_of, write_importance
from qwench.formats.gguf_source import GgufSource
from qwench.formats.gguf_writer import write_gguf
from qwench.models import map_of
from qwench.models.run import Trunk
from qwench.result import Acceptance
from qwench.steps.checks.verify import row_divergence
from qwench.steps.measures.evaluate import measured_acceptance
from qwench.stream.calibration import calibration_rows
from qwench.stream.importance import importance_walk
from qwench.stream.rows import Rows, held_out_rows

TYPES = ("BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M")
WITHOUT_CHOICE = ("F32", "F16", "BF16", "Q8_0")
"""Types whose bytes importance cannot change."""
SAMPLES, SAMPLE_LENGTH = 64, 256
DRAFTED, PROMPT, WRITTEN = 2, 64, 48


@dataclass
class Bench:
    """One demo checkpoint, read once: hidden states of the rows, and importance."""

    source: Checkpoint
    rows: Rows
    trunk: Trunk
    normed: Tensor
    importance: Importance
    folder: Path

    def measure(self, file_type: str, importance: bool, engine: bool) -> tuple[dict[str, Any], TokenMeasures]:
        """One row of the table."""
        plan = plan_gguf(self.source, self.trunk.map, file_type=file_type, importance=importance)
        path = self.folder / f"{file_type}{'-importance' if importance else ''}.gguf"
        size = write_gguf(plan, self.source, path, importance=self.importance if importance else None).nbytes
        release = GgufSource(path, self.source.config)
        trunk = Trunk(release, release.map)
        normed = trunk.forward(self.rows.ids)
        found = measure_tokens(self.normed, normed, self.trunk.logits, trunk.logits, self.rows.ids, trunk.vocabulary)
        accepted = measured_acceptance(trunk, normed, found.greedy_release, self.rows.ids)
        mean = clustered_mean(found.divergence, found.documents)
        row: dict[str, Any] = {
            "type": file_type, "importance": importance, "bytes": size, "bits_per_weight": round(plan.bits_per_weight, 3),
            "kl": mean.mean, "kl_standard_error": mean.standard_error, "top1": float(found.agrees.double().mean()),
            "acceptance": shares(accepted),
        }  # fmt: skip
        if engine:
            row |= self.engine(path)
        path.unlink()
        return row, found

    def engine(self, path: Path) -> dict[str, Any]:
        """The same file in llama.cpp: mean KL(source || llama.cpp) on a few rows, and its counters of drafts."""
        asked = [[int(i) for i in row[:PROMPT]] for row in self.rows.ids[:8]]
        answer = ENGINES["llama.cpp"](
            Request(path, asked, generate=WRITTEN, image=False, speculate=DRAFTED, threads=torch.get_num_threads())
        )
        assert answer.refused is None and answer.speculation is not None, answer.refused
        with torch.no_grad():
            ours = torch.log_softmax(self.trunk.logits(self.normed[: len(asked), : PROMPT - 1]), -1)
        found = [row_divergence(o, tokens, theirs)[0] for o, (tokens, theirs) in zip(ours, answer.logprobs, strict=True)]
        counted = answer.speculation
        return {
            "engine_kl": float(np.concatenate(found).mean()),
            "drafted": counted["drafted"],
            "accepted": counted["accepted"],
        }


def shares(side: Acceptance | None) -> list[float]:
    """Acceptance by position."""
    return [estimate.mean for estimate in side.by_position] if side else []


def bench(which: str, documents: int, length: int, folder: Path) -> tuple[Bench, list[float]]:
    """Read the source, and observe the calibration rows; with the source's own acceptance."""
    source = Checkpoint.open(checkpoint(which))  # type: ignore[arg-type]
    network, rows = map_of(source), held_out_rows(source.folder, documents, length)
    trunk = Trunk(source, network)
    normed = trunk.forward(rows.ids)
    greedy = torch.stack([trunk.greedy(row) for row in normed])
    accepted = shares(measured_acceptance(trunk, normed, greedy, rows.ids))
    observed = calibration_rows(source.folder, text="carried", samples=SAMPLES, length=SAMPLE_LENGTH)
    squares = importance_walk(source, network, observed.ids)
    importance = importance_of(
        plan_gguf(source, network), squares, texts=[observed.text], length=observed.length, rows=len(observed.ids)
    )
    write_importance(folder / "imatrix.gguf", importance)
    return Bench(source, rows, trunk, normed, importance, folder), accepted


def ladder(which: str, types: list[str], documents: int, length: int, engine: bool) -> Iterator[dict[str, Any]]:
    """Every row of one checkpoint; where importance was used, with its gain over the same type without."""
    with tempfile.TemporaryDirectory() as name:
        made, accepted = bench(which, documents, length, Path(name))
        for file_type in types:
            row, plain = made.measure(file_type, False, engine)
            common = {"model": which, "tokens": len(plain.divergence), "acceptance_source": accepted}
            yield common | row
            if file_type not in WITHOUT_CHOICE:
                row, weighed = made.measure(file_type, True, engine)
                gain = clustered_mean(plain.divergence - weighed.divergence, plain.documents)
                yield common | row | {"kl_gain": gain.mean, "kl_gain_standard_error": gain.standard_error}


def markdown(rows: list[dict[str, Any]]) -> str:
    engine = any("engine_kl" in row for row in rows)
    head = [
        "model",
        "type",
        "importance",
        "size",
        "bits",
        "KL, mean ± SE (nats)",
        "gain by importance ± SE",
        "top-1",
        "acceptance 1, 2, 3",
    ]
    head += ["KL in llama.cpp", "its drafts accepted"] * engine
    lines = [f"| {' | '.join(head)} |", "|---|---|---|--:|--:|--:|--:|--:|--:|" + "--:|--:|" * engine]
    for r in rows:
        gain = f"{r['kl_gain']:+.1e} ± {r['kl_gain_standard_error']:.0e}" if "kl_gain" in r else ""
        cells = [
            r["model"], r["type"], "yes" if r["importance"] else "", f"{r['bytes'] / 1e6:.2f} MB", f"{r['bits_per_weight']:.2f}",
            f"{r['kl']:.2e} ± {r['kl_standard_error']:.0e}", gain, f"{r['top1']:.2%}", " ".join(f"{a:.3f}" for a in r["acceptance"]),
        ]  # fmt: skip
        if engine:
            cells += [f"{r['engine_kl']:.2e}", f"{r['accepted']} of {r['drafted']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=["dense", "moe"], default=["dense", "moe"])
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--engine", action="store_true")
    args = parser.parse_args()
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    every: list[dict[str, Any]] = []
    for which in args.models:
        rows = []
        for row in ladder(which, args.types, args.documents, args.length, args.engine):
            print(row, flush=True)
            rows.append(row)
        (results / f"gguf-{which}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        (results / f"gguf-{which}.md").write_text(markdown(rows) + "\n", encoding="utf-8")
        every += rows
    print(markdown(every))


if __name__ == "__main__":
    main()
