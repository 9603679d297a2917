"""What is in the folder that an entrant left, read by our own reader whoever wrote it, and opened by the engine that it is for.

KL(source || release) per token in nats, computed in float32 on held-out documents, with a standard error over documents; two entrants are compared by the differences of their KL
document by document. A folder whose MTP head cannot be read (experts of the trunk pruned and its own not) is judged without it, and said to have lost it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.source import Part, TensorEntry, TensorSource
from qwench.engines import ENGINES, Request
from qwench.errors import CheckpointError, UserError
from qwench.evaluation.acceptance import acceptance, accepted, draft_tokens
from qwench.evaluation.divergence import TokenMeasures, measure_tokens
from qwench.evaluation.statistics import Mean, clustered_mean
from qwench.formats.adapter import FOLDER
from qwench.formats.release import has_corrections, open_source
from qwench.models import ModelMap, map_of
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk
from qwench.steps.checks.verify import verify
from qwench.stream.rows import held_out_rows

READERS = {"compressed-tensors": "transformers", "gptq": "gptqmodel", "auto-round": "auto-round", None: "transformers"}
"""By `quant_method`: who opens such a folder."""


@dataclass(frozen=True)
class Judgement:
    """What a folder is worth.

    Attributes:
        kl, top1: over tokens, with standard errors over documents.
        acceptance: of the MTP head's first draft; None where there is no head that can be run, and `head` says why.
        divergence: float64 [tokens], KL of each.
        bytes: of its safetensors.
    """

    kl: Mean
    top1: Mean
    acceptance: Mean | None
    head: str
    divergence: Tensor
    bytes: int


class WithoutHead:
    """A source without its MTP head; see `TensorSource`."""

    def __init__(self, source: TensorSource) -> None:
        self.source, self.folder = source, source.folder
        self.config: dict[str, Any] = copy.deepcopy(source.config)
        self.config.get("text_config", self.config)["mtp_num_hidden_layers"] = 0
        self.tensors: Mapping[str, TensorEntry] = {n: e for n, e in source.tensors.items() if not n.startswith("mtp.")}

    def read(self, name: str, part: Part = ()) -> Tensor:
        return self.source.read(name, part)


class Judge:
    """The source on the held-out rows, once for all entrants.

    Args:
        source: its folder.
        ids: int64 [rows, length].
    """

    def __init__(self, source: Path, ids: Tensor) -> None:
        opened = open_source(source)
        self.ids, self.trunk = ids, Trunk(opened, map_of(opened))
        self.normed = self.trunk.forward(ids)
        self.documents = torch.arange(len(ids)).repeat_interleave(ids.shape[1] - 1)
        self.acceptance = self._acceptance(self.trunk, self.normed, self._measures(self.trunk, self.normed).greedy_source)

    def judge(self, folder: Path) -> Judgement:
        """Raises UserError where the folder cannot be read, with its head or without."""
        source, network, head = _opened(folder)
        trunk = Trunk(source, network)
        normed = trunk.forward(self.ids)
        found = self._measures(trunk, normed)
        return Judgement(
            clustered_mean(found.divergence, self.documents), clustered_mean(found.agrees, self.documents),
            self._acceptance(trunk, normed, found.greedy_release) if network.has_mtp else None, head, found.divergence,
            sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        )  # fmt: skip

    def difference(self, one: Judgement, other: Judgement) -> Mean:
        """KL of one less KL of the other, in pairs."""
        return clustered_mean(one.divergence - other.divergence, self.documents)

    def _measures(self, trunk: Trunk, normed: Tensor) -> TokenMeasures:
        return measure_tokens(self.normed, normed, self.trunk.logits, trunk.logits, self.ids, trunk.vocabulary)

    def _acceptance(self, trunk: Trunk, normed: Tensor, greedy: Tensor) -> Mean:
        drafts = draft_tokens(trunk, MtpHead(trunk.source, trunk.map), normed, self.ids)
        return acceptance(accepted(greedy, drafts))[0]


def _opened(folder: Path) -> tuple[TensorSource, ModelMap, str]:
    """A folder, its map, and what is to be said of its MTP head."""
    source = open_source(folder)
    try:
        network = map_of(source)
        return source, network, "there" if network.has_mtp else "lost"
    except CheckpointError as error:
        rest = WithoutHead(source)
        network = map_of(rest)  # raises where the trunk is at fault
        return rest, network, f"does not fit: {_first_line(error)}"


def opens(folder: Path, timeout: float) -> str:
    """What the engine that the folder is for says to it: `transformers: agrees, KL 1e-6 to our reading`."""
    quantized = open_source(folder).config.get("quantization_config") or {}
    engine = READERS.get(quantized.get("quant_method"), "transformers")
    try:
        found = verify(folder, engine, threads=1, timeout=timeout, adapter=folder / FOLDER if has_corrections(folder) else None)
    except CheckpointError:  # what we cannot map has no reading of ours to compare with
        return _loads(folder, engine, timeout)
    except UserError as error:
        return f"{engine}: {_first_line(error)}"
    kl = "" if found.mean_kl is None else f", KL {found.mean_kl:.1e} to our reading"
    missing = f"; {len(found.uninitialized)} of its parameters left as they were" if found.uninitialized else ""
    notes = "; ".join(note for note in found.notes if "refused" in note)
    return f"{engine}: {found.outcome}{kl}{missing}{'; ' if notes else ''}{notes[:240]}"


def _loads(folder: Path, engine: str, timeout: float) -> str:
    """Whether an engine loads a folder at all."""
    rows = [[int(i) for i in row] for row in held_out_rows(folder, documents=2, length=64).ids]
    try:
        answer = ENGINES[engine](Request(folder.resolve(), rows, generate=4, image=False, threads=1, timeout=timeout))
    except UserError as error:
        return f"{engine}: {_first_line(error)}"
    if answer.refused:
        return f"{engine}: refused: {answer.refused[:240]}"
    return f"{engine}: loads, its MTP head not read; {len(answer.uninitialized)} parameters left as they were"


def _first_line(error: UserError) -> str:
    return " ".join(str(error).split())[:240]
