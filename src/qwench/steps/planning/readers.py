"""What engines would make of a release, told from its plan: names, shapes and config are known before a byte is written, and the rules of `qwench.loading` ask for no more.

A plan says it as notes, so that nobody prunes and tunes for hours what the engine that he has in mind drops; the record of the finished release keeps the proofs, and its card speaks of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from qwench.checkpoint.source import Part, TensorEntry
from qwench.errors import CheckpointError
from qwench.loading.proof import prove
from qwench.result import LoadFinding, LoadProof
from qwench.steps.checks.proof import recorded
from qwench.steps.planning.plan import Plan

ENGINES = ("vllm", "sglang", "transformers")
"""Whose newest known version is asked; see `loading.proof.TABLES`."""
NAMES = 12
"""Names of tensors that are kept of each finding."""


class Planned:
    """A release that is not there yet: its config, and every tensor by name with the file that it will lie in. See `StoredSource`; nothing of it can be read."""

    notes: tuple[str, ...] = ()

    def __init__(self, plan: Plan) -> None:
        self.folder, self.config = Path(plan.recipe.name), plan.config
        self.tensors: Mapping[str, TensorEntry] = {
            spec.name: TensorEntry(spec.name, spec.dtype, spec.shape, file.name)
            for file in plan.files
            if "/" not in file.name  # corrections lie beside the release
            for spec in file.tensors
        }

    def read(self, name: str, part: Part = ()) -> Tensor:
        raise AssertionError("a plan holds no numbers")

    def chunks(self, name: str, part: Part = ()) -> Iterator[memoryview]:
        raise AssertionError("a plan holds no numbers")

    def stamp(self) -> str:
        return ""

    def close(self) -> None:
        """There is nothing to close."""


def planned_proofs(plan: Plan) -> list[LoadProof]:
    """How each engine would load the release; none where its config is of a kind that no table knows."""
    source = Planned(plan)
    try:
        proofs = [recorded(prove(source, engine, values=False)) for engine in ENGINES]
    except CheckpointError:
        return []
    return [proof.model_copy(update={"findings": [_short(finding) for finding in proof.findings]}) for proof in proofs]


def _short(finding: LoadFinding) -> LoadFinding:
    return finding.model_copy(update={"names": finding.names[:NAMES]})


def reader_notes(plan: Plan) -> list[str]:
    """One sentence for each engine that would not load the release whole, or not compute what it says."""
    return [note for proof in planned_proofs(plan) if (note := trouble_of(proof))]


def trouble_of(proof: LoadProof) -> str:
    """The worst finding of a proof in a sentence, and how many more there are; nothing where all is good."""
    bad = [finding for finding in proof.findings if finding.level != "note"]
    if not bad:
        return ""
    more = f" (and {len(bad) - 1} more: `qwench verify --engine {proof.engine} --offline` tells all)" if len(bad) > 1 else ""
    return f"{proof.engine} {proof.version}, by its rules: {bad[0].what}; {bad[0].mend}{more}"
