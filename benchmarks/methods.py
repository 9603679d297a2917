"""What each calibrated method gives on a demo checkpoint: same rows, same bits, same held-out text, differences in pairs.

    python -m benchmarks.methods [--model dense] [--sets A B] [--methods rtn awq ...] [--rows 64]

Two sets of weights, INT4 in groups of 128 with a signed full-range scale: A, the MLPs of layers 1 and up (what the AWQ release quantizes); B, every linear layer of
the text model. Every method reads the same calibration rows and is compared on the same held-out documents: KL(source || changed) per token in nats. Tokens of a
document are alike, so standard errors are over documents, and methods are compared by the differences of their KL document by document: their own spread, which is
mostly that some texts are harder than others, drops out.

Nothing is written but the table (`benchmarks/results/methods-MODEL.json`, Markdown on standard output): the changed weights stay in memory, rounded to what a file
would hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import TORCH_DTYPE, Part, TensorEntry, TensorSource
from qwench.demo import checkpoint
from qwench.evaluation.divergence import measure_tokens
from qwench.evaluation.statistics import clustered_mean
from qwench.models import map_of
from qwench.models.map import ModelMap
from qwench.models.run import Trunk
from qwench.numerics import Scheme
from qwench.recipe import Correct, Export, Quantize, Recipe, Rule, Smooth, Step
from qwench.steps.changes import Rounding, Smoothing, Tuning
from qwench.steps.planning.assign import assign
from qwench.stream.calibration import calibration_rows
from qwench.stream.hidden import HiddenFiles
from qwench.stream.live import LiveBlock
from qwench.stream.rows import held_out_rows
from qwench.stream.walk import Change, Walk, walk

SETS = {
    "A": (("mlp.*", "expert.*", "shared.gate", "shared.up", "shared.down"), "1.."),
    "B": (
        (
            "attention.[qkvo]",
            "delta.qkv",
            "delta.z",
            "delta.out",
            "mlp.*",
            "expert.*",
            "shared.gate",
            "shared.up",
            "shared.down",
        ),
        "all",
    ),
}
"""Roles and layers of each set; roles that a model lacks are left out."""
FOLDS = ("norm.post", "norm.input", "attention.v", "mlp.up", "expert.up", "shared.up")
DOCUMENTS, LENGTH = 33, 512


@dataclass(frozen=True)
class Method:
    """One row of the table: a recipe's steps without its targets."""

    quantize: dict[str, Any] = field(default_factory=dict)
    smooth: dict[str, Any] | None = None
    rank: int | None = None
    search: str = "none"


METHODS = {
    "rtn": Method(),
    "rtn, searched": Method(search="mse"),
    "awq, norm.post": Method(smooth={}),
    "awq": Method(smooth={"folds": FOLDS, "clip": True}),
    "gptq": Method({"method": "gptq"}),
    "awq + gptq": Method({"method": "gptq"}, smooth={"folds": FOLDS}),
    "gptq + eora 64": Method({"method": "gptq"}, rank=64),
    "autoround": Method({"method": "autoround"}),
    "autoround from rounding": Method({"method": "autoround", "autoround": {"start": "rounding"}}),
}


class Overlay:
    """A checkpoint in which some tensors hold other values."""

    def __init__(self, source: TensorSource, values: Mapping[str, Tensor]) -> None:
        self.source, self.values = source, values
        self.folder, self.config = source.folder, source.config

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        return self.source.tensors

    def read(self, name: str, part: Part = ()) -> Tensor:
        return self.values[name][part].clone() if name in self.values else self.source.read(name, part)


def changes_of(method: Method, set_name: str, source: TensorSource, map: ModelMap) -> tuple[list[Change], dict[str, Scheme]]:
    """The changes of a method on one set of weights, and the scheme of each of them."""
    there = {slot.role for block in map.blocks for slot in block.slots}
    roles, layers = SETS[set_name]
    roles = tuple(r for r in roles if any(t == r or t.startswith(r.partition("*")[0].partition("[")[0]) for t in there))
    quantize = Quantize(**method.quantize, rules=(Rule(roles=roles, scheme="int4", layers=layers, search=method.search),))
    recipe = Recipe(name="benchmark", steps=(Step(quantize=quantize), Step(export=Export())))
    schemes, _, complaints = assign(recipe, map)
    assert not complaints, complaints
    correct = Correct(rank=method.rank) if method.rank else None  # type: ignore[arg-type]
    changes: list[Change] = []
    if method.smooth is not None:
        changes.append(Smoothing(Smooth(**method.smooth, layers=layers), schemes, source))
    changes.append((Tuning if quantize.method == "autoround" else Rounding)(quantize, correct, schemes))
    return changes, schemes


def keeper(source: TensorSource, values: dict[str, Tensor]) -> Callable[[LiveBlock], None]:
    """Keeps what a file would hold of each layer: decoded codes, and what smoothing altered in its stored dtype."""

    def emit(live: LiveBlock) -> None:
        for slot in live.block.slots:
            if slot.module in live.quantized:
                value = live.weight(slot)
            elif slot.module in live.altered:
                value = live.weight(slot).to(TORCH_DTYPE[source.tensors[slot.tensor].dtype])
            else:
                continue
            if slot.tensor not in values:
                values[slot.tensor] = source.read(slot.tensor).float()
            values[slot.tensor][slot.part] = value.float()

    return emit


def changed_weights(changes: list[Change], source: TensorSource, map: ModelMap, ids: Tensor) -> dict[str, Tensor]:
    """Walk the rows through the network."""
    values: dict[str, Tensor] = {}
    with TemporaryDirectory() as folder:
        files = HiddenFiles(Path(folder), (*ids.shape, map.other("embed").shape[1]), torch.bfloat16)
        walk(Walk(changes), source, map, ids, files, keeper(source, values), lambda *_: None)
    return values


@dataclass(frozen=True)
class Yardstick:
    """The source's hidden states on the held-out rows, and what changed weights make of them."""

    trunk: Trunk
    ids: Tensor
    normed: Tensor

    def divergence(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """KL of every token, nats, and the document of each."""
        changed = Trunk(Overlay(self.trunk.source, values), self.trunk.map)
        normed = changed.forward(self.ids)
        found = measure_tokens(self.normed, normed, self.trunk.logits, self.trunk.logits, self.ids, self.trunk.vocabulary)
        return found.divergence, found.documents


def measure(
    name: str, set_name: str, source: TensorSource, map: ModelMap, ids: Tensor, yardstick: Yardstick
) -> tuple[dict[str, Any], Tensor]:
    """One row of the table, and its KL by token."""
    changes, schemes = changes_of(METHODS[name], set_name, source, map)
    wall, processor = time.monotonic(), time.process_time()
    values = changed_weights(changes, source, map, ids)
    wall, processor = time.monotonic() - wall, time.process_time() - processor
    divergence, documents = yardstick.divergence(values)
    found = clustered_mean(divergence, documents)
    return {
        "method": name, "set": set_name, "weights": len(schemes), "kl": found.mean, "standard_error": found.standard_error,
        "wall_seconds": round(wall, 1), "cpu_seconds": round(processor, 1),
    }, divergence  # fmt: skip


def compare(rows: list[dict[str, Any]], divergences: Mapping[str, Tensor], documents: Tensor, base: str) -> None:
    """Adds to each row how its KL differs from that of `base`, in pairs."""
    for row in rows:
        if base in divergences:
            difference = clustered_mean(divergences[row["method"]] - divergences[base], documents)
            row[f"minus {base}"] = {"kl": difference.mean, "standard_error": difference.standard_error}


def markdown(rows: list[dict[str, Any]]) -> str:
    bases = [key for key in rows[0] if key.startswith("minus ")]
    lines = [
        "| set | method | KL, mean ± SE | " + " | ".join(f"{b}, ± SE" for b in bases) + " | CPU s |",
        "|---|---|--:|" + "--:|" * len(bases) + "--:|",
    ]
    for row in rows:
        pairs = " | ".join(f"{row[b]['kl']:+.5f} ± {row[b]['standard_error']:.5f}" for b in bases)
        kl = f"{row['kl']:.5f} ± {row['standard_error']:.5f}"
        lines.append(f"| {row['set']} | {row['method']} | {kl} | {pairs} | {row['cpu_seconds']} |")
    return "\n".join(lines)


def table(which: str, set_name: str, methods: list[str], samples: int) -> list[dict[str, Any]]:
    """All methods on one set."""
    folder = checkpoint(which)  # type: ignore[arg-type]
    source = Checkpoint.open(folder)
    map, ids = map_of(source), calibration_rows(folder, samples=samples, length=LENGTH).ids
    trunk, held = Trunk(source, map), held_out_rows(folder, DOCUMENTS, LENGTH).ids
    yardstick = Yardstick(trunk, held, trunk.forward(held))
    documents = torch.arange(len(held)).repeat_interleave(held.shape[1] - 1)
    rows, divergences = [], {}
    for name in methods:
        row, divergences[name] = measure(name, set_name, source, map, ids, yardstick)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    for base in ("rtn", "gptq"):  # each difference that the order of methods rests on
        compare(rows, divergences, documents, base)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["dense", "moe"], default="dense")
    parser.add_argument("--sets", nargs="*", choices=list(SETS), default=list(SETS))
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rows", type=int, default=128, help="calibration rows of 512 tokens")
    args = parser.parse_args()
    every = [row for set_name in args.sets for row in table(args.model, set_name, args.methods, args.rows)]
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"methods-{args.model}.json").write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
    print(markdown(every))


if __name__ == "__main__":
    main()
