"""REAP in a walk: each layer's experts are ranked while the original rows go through the original layer, and the layer is left with those that stay.

Ranked on what the original network computes, as published: the choice depends on rows and checkpoint alone, not on what else a recipe does to the layers before. It comes first
of a layer's changes, so that everything behind it (smoothing, rounding, tuning, the rows on their way to the next layer) sees the layer without the others.

Tokens whose own hidden state is finite and that an expert answers with NaN or infinity are not counted; an expert that answers none of its tokens with finite numbers stops the walk. The
MTP head is a layer like the others: its experts are ranked by its own routing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwench.errors import CheckpointError
from qwench.methods.reap import SaliencySums, keep, keep_complaint, observe_expert
from qwench.models.geometry import read_geometry
from qwench.models.map import Block, ModelMap
from qwench.models.pruned import Pruned
from qwench.recipe import Prune
from qwench.result import PrunedLayer
from qwench.steps.changes.repair import added_by_all, repair
from qwench.stream.experts import taking_experts
from qwench.stream.head import head_block
from qwench.stream.live import LiveBlock
from qwench.stream.walk import Rows

STACKED = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Parameters of the transformers layer with one entry for each expert."""
MEND = "the checkpoint is damaged or overflows: check its dtype and source"


@dataclass
class Pruning:
    """Attributes:
    settings: the recipe's step.
    target: the checkpoint as it will be; it is told who stays.
    map: of that.
    found: what was found in each layer, by its label.
    reports: the same in a line.
    """

    settings: Prune
    target: Pruned
    map: ModelMap
    found: dict[str, PrunedLayer] = field(default_factory=dict)
    reports: dict[str, str] = field(default_factory=dict)
    name = "pruning"
    needs_original = True

    def __post_init__(self) -> None:
        self._sums = SaliencySums.zero(self.target.before)
        self._broken = torch.zeros(self.target.before, dtype=torch.int64)

    @contextmanager
    def watching(self, live: LiveBlock) -> Iterator[None]:
        """Sum up what each expert does to the original rows. Raises CheckpointError for an expert that answers none with finite numbers."""
        self.__post_init__()
        with taking_experts(live, self._take):
            yield
        silent = torch.nonzero((self._sums.tokens == 0) & (self._broken > 0)).flatten().tolist()
        if silent:
            raise CheckpointError(
                f"{live.label}: expert {silent[0]} puts out NaN or infinity for each of the {int(self._broken[silent[0]]):,} calibration tokens that are "
                f"sent to it, so that it has no saliency" + (f"; so do {silent[1:]}" if silent[1:] else ""),
                MEND,
            )

    def _take(self, expert: int, inputs: Tensor, weights: Tensor, outputs: Tensor) -> None:
        finite = outputs.isfinite().all(-1)
        self._broken[expert] += int((inputs.isfinite().all(-1) & ~finite).sum())
        self._sums += observe_expert(expert, weights[finite], outputs[finite], self.target.before)

    def __call__(self, live: LiveBlock, rows: Rows) -> None:
        top_k = read_geometry(self.target.config).chosen
        ranking = self._ranking(live)
        if wrong := keep_complaint(ranking, self.target.count, top_k):
            raise CheckpointError(f"{live.label}: {wrong}", MEND)
        kept = keep(ranking, self.target.count, top_k)
        self.target.settle(live.label, kept)
        added = added_by_all(live, rows) if self.settings.repair == "least-squares" else None
        narrow(live, kept, self._block(live))
        found = self._layer(live, kept)
        if added:
            before, after, changed = repair(live, added)
            found = found.model_copy(update={"error": before, "error_repaired": after, "repaired": changed})
        self.found[live.label], self.reports[f"{live.label} pruning"] = found, said_of(found)

    def _ranking(self, live: LiveBlock) -> Tensor:
        """How much each expert counts, [E]."""
        if self.settings.criterion != "random":
            return self._sums.saliency(self.settings.criterion)
        seed = self.settings.seed * 1000 + live.block.index + (500 if live.block.component == "mtp" else 0)
        return torch.rand(self.target.before, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def _block(self, live: LiveBlock) -> Block:
        """The layer as the pruned checkpoint has it."""
        if live.block.component == "mtp":
            return head_block(self.target, self.map)
        return self.map.blocks[live.block.index]

    def _layer(self, live: LiveBlock, kept: list[int]) -> PrunedLayer:
        sums, saliency = self._sums, self._sums.saliency("reap")
        return PrunedLayer(
            component=live.block.component,
            layer=live.block.index,
            kept=kept,
            tokens=sums.tokens.tolist(),
            saliency=[float(f"{value:.6g}") for value in saliency.tolist()],
            saliency_kept=share_of(saliency, kept),
            contribution_kept=share_of(sums.contribution, kept),
            not_finite=int(self._broken.sum()),
        )


def narrow(live: LiveBlock, kept: list[int], block: Block) -> None:
    """Leave a layer in memory with some of its experts, numbered anew; `block` is the layer without the others.

    The transformers module stays, though it was made for more experts: what it computes goes by the weights that it is lent and by the experts that the router chooses."""
    chosen = torch.tensor(kept)
    for name in STACKED:
        live.weights[name] = live.weights[name][chosen]
    live.block = block


def share_of(values: Tensor, kept: list[int]) -> float:
    """Of a sum over all experts, the share that stays; 1 where there is nothing to lose."""
    total = float(values.sum())
    return float(values[kept].sum()) / total if total else 1.0


def said_of(found: PrunedLayer) -> str:
    """One line for the log."""
    gone = [expert for expert in range(len(found.tokens)) if expert not in found.kept]
    mended = ""
    if found.error is not None and found.error_repaired is not None:
        mended = f"; {found.repaired} down projections changed, error {found.error:.4f} to {found.error_repaired:.4f}"
    return (
        f"{len(found.kept)} of {len(found.tokens)} experts stay, with {found.saliency_kept:.1%} of the saliency and {found.contribution_kept:.1%} of what experts "
        f"add to the tokens; without {gone}"
        + (f"; {found.not_finite:,} outputs were not finite" if found.not_finite else "")
        + mended
    )
