"""`qwench verify DIR --engine NAME --offline`: the load proof of `qwench.loading`, and what of it goes into the record."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from qwench.checkpoint.reader import Checkpoint
from qwench.loading.findings import Finding, Proof
from qwench.loading.proof import prove, table_of
from qwench.result import LoadFinding, LoadProof, Result, revise_result

SHOWN = 12
"""Findings of an engine that are shown; all are in the record and under --json."""


def offline(folder: Path, engine: str) -> LoadProof:
    """Play through how an engine would load a folder.

    Raises:
        EngineError: no table of rules has this name.
        CheckpointError: the folder cannot be read, or is quantized in a way that no table knows.
    """
    table_of(engine)
    with Checkpoint.open(folder) as source:
        return recorded(prove(source, engine))


def offline_release(folder: Path, engine: str) -> LoadProof:
    """The same, and put into the record of a release that has one. Raises as `offline`."""
    proof = offline(folder, engine)

    def replace(result: Result) -> None:
        others = [p for p in result.load_proofs if (p.engine, p.version) != (proof.engine, proof.version)]
        result.load_proofs = [*others, proof]

    revise_result(folder, replace)
    return proof


def recorded(proof: Proof) -> LoadProof:
    """A proof as the record keeps it."""
    return LoadProof(
        engine=proof.engine, version=proof.version, good=proof.good, models=list(proof.models), consumed=proof.consumed,
        findings=[_finding(f) for f in proof.findings], notes=list(proof.notes),
    )  # fmt: skip


def _finding(found: Finding) -> LoadFinding:
    return LoadFinding(level=found.level, what=found.what, mend=found.mend, rule=found.rule, names=list(found.names))


def _verdict(proof: LoadProof) -> str:
    if any(found.level == "unknown" for found in proof.findings):
        return " was not played through"
    models = f" ({', '.join(proof.models)})" if proof.models else ""
    whole = "would load it whole" if proof.good else "would not load it as it is meant"
    return f"{models} {whole}: {proof.consumed:,} stored tensors reach a parameter"


def show(proof: LoadProof, console: Console) -> None:
    """A proof in plain words."""
    console.print(f"{proof.engine} {proof.version}{_verdict(proof)}", markup=False, soft_wrap=True)
    for found in proof.findings[:SHOWN]:
        rule = f"\n    rule: {found.rule}" if found.rule else ""
        console.print(f"  {found.level}: {found.what}\n    mend: {found.mend}{rule}", markup=False, soft_wrap=True)
    if len(proof.findings) > SHOWN:
        console.print(f"  and {len(proof.findings) - SHOWN} more", markup=False)
    for note in proof.notes:
        console.print(f"  note: {note}", markup=False, soft_wrap=True)
