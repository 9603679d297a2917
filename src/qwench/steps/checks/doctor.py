"""`qwench doctor`: what would go wrong with anybody's release, where, and how to mend it. Reads headers and config, of a folder also the few bytes of global scales.

It puts together what `qwench inspect` finds lost or wrong and the load proofs of every engine; an engine's older version is told only where it differs from the newest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qwench.checkpoint.headers import open_headers
from qwench.checkpoint.source import StoredSource
from qwench.errors import CheckpointError
from qwench.loading.modelopt import effective
from qwench.loading.replay import container_for
from qwench.models.facts import facts
from qwench.models.geometry import Complaint
from qwench.result import LoadProof
from qwench.steps.checks.inspect import losses
from qwench.steps.checks.mend import mended, write_config
from qwench.steps.checks.proof import recorded, show

PROBLEMS = 3
"""Exit code where something goes wrong somewhere."""
VERDICTS = {
    (True, True): "nothing to complain of",
    (True, False): "nothing to complain of in the newest versions; older ones stumble, see above",
    (False, False): "there are problems, see above",
    (False, True): "there are problems, see above",
}
"""By whether the newest versions are content, and whether all are."""
NEWEST = ("vllm", "sglang", "transformers")


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        model: what the person called it.
        complaints: what is wrong or missing whatever the engine: (what, mend).
        proofs: by the name of the table.
        mends: what `--fix` would change, or has changed.
        changed: files that were written.
        notes: what could not be looked at.
    """

    model: str
    complaints: tuple[Complaint, ...]
    proofs: dict[str, LoadProof]
    mends: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether nothing is wrong in the newest version of any engine."""
        return not self.complaints and all(name in self.proofs and self.proofs[name].good for name in NEWEST)

    def as_data(self) -> dict[str, Any]:
        """For --json."""
        return {
            "model": self.model, "good": self.good, "complaints": [{"what": what, "mend": mend} for what, mend in self.complaints],
            "engines": {name: proof.model_dump(mode="json") for name, proof in self.proofs.items()},
            "mends": list(self.mends), "changed": list(self.changed), "notes": list(self.notes),
        }  # fmt: skip


def examine(model: str, fix: bool = False) -> Examination:
    """Look at a model, and mend its metadata where that is asked for.

    Args:
        model: a folder, or a hub id, of which only config and headers are fetched.
        fix: write what is mended; only for folders.

    Raises:
        CheckpointError: it cannot be read, or `fix` is asked for a model on the hub.
        OutputError: the folder cannot be written.
    """
    source, here = open_headers(model)
    if fix and not (here and Path(model).expanduser().is_dir()):
        raise CheckpointError(f"{model} is not a folder of yours: nothing can be mended there", "fetch it, and give the folder")
    try:
        found = mended(source, here)
    except CheckpointError as error:  # a method or numbers that no table knows
        unknown = (f"how engines would load it cannot be told: {error.what}", error.mend)
        return Examination(model, (*complaints(source), unknown), {}, notes=tuple(source.notes))
    changed: list[str] = []
    if fix and found.told:
        changed = write_config(source.folder, found.config, container_for(found.config))
        source, _ = open_headers(model)
    proofs = found.after if changed else found.before
    return Examination(
        model=model, complaints=tuple(complaints(source)), proofs={name: recorded(proof) for name, proof in proofs.items()},
        mends=tuple(found.told), changed=tuple(changed), notes=tuple(source.notes),
    )  # fmt: skip


def complaints(source: StoredSource) -> list[Complaint]:
    """What `qwench inspect` finds lost or wrong; quantized names, which it does not know, are left to the proofs."""
    found = facts(source)
    return [*losses(found), *(found.complaints if not effective(source).config.get("quantization_config") else ())]


def show_examination(found: Examination, console: Console) -> None:
    """Everything in plain words."""
    for what, mend in found.complaints:
        console.print(f"wrong everywhere: {what}\n  mend: {mend}", markup=False, soft_wrap=True)
    for name, proof in found.proofs.items():
        newest = found.proofs.get(proof.engine)
        if name in NEWEST or newest is None or [f.what for f in proof.findings] != [f.what for f in newest.findings]:
            show(proof, console)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if found.changed:
        console.print(f"mended, in {', '.join(found.changed)} (no tensor was touched):", markup=False)
    elif found.mends:
        console.print("`qwench doctor --fix` would mend:", markup=False)
    for mend in found.mends:
        console.print(f"  - {mend}", markup=False, soft_wrap=True)
    console.print(VERDICTS[found.good, all(proof.good for proof in found.proofs.values())], markup=False)
