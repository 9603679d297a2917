"""What pruning costs a mixture of experts, by how the experts are ranked: the published saliency against the criteria that its paper compares with, and against chance.

    python -m benchmarks.experts [--ratios 0.25 0.5] [--rows 128] [--seeds 10] [--criteria reap frequency ...]

The demo checkpoint of 12 experts, 4 a token; the MTP head's experts are ranked by its own routing. Calibrated on the carried text, measured on held-out documents: KL(source || pruned) per token
in nats, and the share of drafts of the MTP head that the pruned trunk accepts at position 1. Standard errors are over documents; criteria are compared with REAP's by differences document by
document. `random` is the mean over seeds. `reap, layer after layer` ranks each layer on what the pruned layers before it put out, which is not as published; `reap,
repaired` is the recipe's `repair: least-squares`.

Nothing is written but the table (`benchmarks/results/experts-moe.json`, Markdown on standard output): a pruned network is a view of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods import Overlay, keeper
from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.evaluation.acceptance import acceptance, accepted, draft_tokens
from qwench.evaluation.divergence import measure_tokens
from qwench.evaluation.statistics import clustered_mean
from qwench.models import map_of
from qwench.models.map import ModelMap
from qwench.models.mtp import MtpHead
from qwench.models.pruned import Pruned
from qwench.models.run import Trunk
from qwench.recipe import Prune
from qwench.recipe.prune import Criterion
from qwench.result import PrunedLayer
from qwench.steps.changes import Pruning
from qwench.stream.calibration import calibration_rows
from qwench.stream.experts import taking_experts
from qwench.stream.hidden import HiddenFiles
from qwench.stream.live import LiveBlock
from qwench.stream.rows import held_out_rows
from qwench.stream.walk import Rows, Walk, walk

LENGTH, DOCUMENTS = 512, 33
CRITERIA: tuple[Criterion, ...] = (
    "reap", "frequency", "weight_sum", "norm_mean", "norm_sum", "norm_max", "contribution_sum", "random",
)  # fmt: skip
ONE_BY_ONE, REPAIRED = "reap, layer after layer", "reap, repaired"


class OneByOne(Pruning):
    """Ranks a layer on what the pruned layers before it put out."""

    @contextmanager
    def watching(self, live: LiveBlock) -> Iterator[None]:
        yield

    def __call__(self, live: LiveBlock, rows: Rows) -> None:
        self.__post_init__()
        with taking_experts(live, self._take):
            for batch in rows.batches():
                live.run(batch)
        super().__call__(live, rows)


def pruned(
    source: Checkpoint, map: ModelMap, ids: Tensor, settings: Prune, change: type[Pruning] = Pruning
) -> tuple[Overlay, list[PrunedLayer]]:
    """The network without the experts that a walk over the rows finds out."""
    target = Pruned(source, map, settings.kept(12))
    pruning, values = change(settings, target, map_of(target)), dict[str, Tensor]()
    with TemporaryDirectory() as folder:
        files = HiddenFiles(Path(folder), (*ids.shape, map.other("embed").shape[1]), torch.bfloat16, len(map.blocks))
        walk(Walk([pruning], mtp=True), source, map, ids, files, keeper(target, values), lambda *_: None)
    return Overlay(target, values), list(pruning.found.values())


class Yardstick:
    """The source on held-out rows, and what is left of it."""

    def __init__(self, source: Checkpoint, map: ModelMap, ids: Tensor) -> None:
        self.trunk, self.ids = Trunk(source, map), ids
        self.normed = self.trunk.forward(ids)
        self.documents = torch.arange(len(ids)).repeat_interleave(ids.shape[1] - 1)

    def measure(self, target: Overlay) -> tuple[Tensor, float]:
        """KL of every token, nats; acceptance at position 1."""
        trunk = Trunk(target, map_of(target))
        normed = trunk.forward(self.ids)
        found = measure_tokens(self.normed, normed, self.trunk.logits, trunk.logits, self.ids, trunk.vocabulary)
        drafts = draft_tokens(trunk, MtpHead(target, trunk.map), normed, self.ids)
        return found.divergence, acceptance(accepted(found.greedy_release, drafts))[0].mean


def table(ratio: float, rows: int, seeds: int, names: list[str]) -> list[dict[str, Any]]:
    """Every criterion at one ratio."""
    folder = checkpoint("moe")
    source = Checkpoint.open(folder)
    map, ids = map_of(source), calibration_rows(folder, samples=rows, length=LENGTH).ids
    yardstick = Yardstick(source, map, held_out_rows(folder, DOCUMENTS, LENGTH).ids)
    found, divergences = list[dict[str, Any]](), dict[str, Tensor]()
    for name in names:
        started = time.process_time()
        criterion: Criterion = "reap" if name in (ONE_BY_ONE, REPAIRED) else name  # type: ignore[assignment]
        settings = Prune(ratio=ratio, criterion=criterion, repair="least-squares" if name == REPAIRED else "none")
        tries = [settings.model_copy(update={"seed": seed}) for seed in range(seeds if name == "random" else 1)]
        made = [pruned(source, map, ids, one, OneByOne if name == ONE_BY_ONE else Pruning) for one in tries]
        seconds = time.process_time() - started
        measured = [yardstick.measure(target) for target, _ in made]
        divergences[name] = torch.stack([divergence for divergence, _ in measured]).mean(0)
        layers = [layer for _, layers in made for layer in layers]
        kl, worse = (
            clustered_mean(values, yardstick.documents)
            for values in (divergences[name], divergences[name] - divergences["reap"])
        )
        row = {
            "ratio": ratio, "criterion": name, "kl": kl.mean, "standard_error": kl.standard_error,
            "minus_reap": worse.mean, "minus_reap_standard_error": worse.standard_error,
            "accepted": sum(share for _, share in measured) / len(measured),
            "saliency_kept": sum(layer.saliency_kept for layer in layers) / len(layers),
            "contribution_kept": sum(layer.contribution_kept for layer in layers) / len(layers),
            "kl_by_try": [float(divergence.mean()) for divergence, _ in measured], "cpu_seconds": round(seconds / len(made), 1),
        }  # fmt: skip
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| experts gone | ranked by | KL, mean ± SE | minus reap, ± SE | drafts accepted | saliency kept | contribution kept |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['ratio']:.0%} | {row['criterion']} | {row['kl']:.4f} ± {row['standard_error']:.4f} | {row['minus_reap']:+.4f} ± "
            f"{row['minus_reap_standard_error']:.4f} | {row['accepted']:.1%} | {row['saliency_kept']:.1%} | {row['contribution_kept']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.25, 0.5])
    parser.add_argument("--rows", type=int, default=128, help="calibration rows of 512 tokens")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--criteria", nargs="*", default=[*CRITERIA, ONE_BY_ONE, REPAIRED], help="reap comes first, whatever else"
    )
    args = parser.parse_args()
    every = [
        row
        for ratio in args.ratios
        for row in table(ratio, args.rows, args.seeds, list(dict.fromkeys(["reap", *args.criteria])))
    ]
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "experts-moe.json").write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
    print(markdown(every))


if __name__ == "__main__":
    main()
