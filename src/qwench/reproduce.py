"""Making a release again from its `provenance.json`, and holding every file against the one that was published.

The same bytes are promised for the same source, recipe, rows, versions and number of threads on the same kind of machine. Rounding to nearest does not depend on
threads; methods that sum over rows do, so the recorded number is used. What differs is said before the work where it can be known: versions, machine, source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError

from qwench.checkpoint.hub import DEMO, ID, locate
from qwench.checkpoint.reader import Checkpoint
from qwench.display import Report
from qwench.errors import CheckpointError, RecipeError, TextError, suggestion_beside
from qwench.models.place import place_of
from qwench.recipe import Recipe
from qwench.recipe.shared import with_inputs
from qwench.run import run_recipe
from qwench.steps.provenance import (
    Provenance,
    SourceProof,
    differing,
    input_proof,
    machine,
    read_provenance,
    release_hashes,
    source_proof,
    versions,
)


@dataclass(frozen=True)
class Compared:
    """One file of a release and of its reproduction.

    Attributes:
        recorded, made: SHA-256; None where there is no such file.
        tensors: names of tensors whose bytes differ, where both files are at hand and hold tensors.
    """

    name: str
    recorded: str | None
    made: str | None
    tensors: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return self.recorded == self.made


@dataclass(frozen=True)
class Reproduction:
    """What came of it.

    Attributes:
        files: every file that either of them has.
        notes: what was different to begin with (versions, machine), and files of the release that are no longer what its run wrote.
    """

    files: list[Compared]
    notes: list[str]

    @property
    def same(self) -> bool:
        return all(file.same for file in self.files)


def reproduce(
    release: Path, out: Path, report: Report, model: str | None = None, donor: str | None = None, device: str | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Reproduction:  # fmt: skip
    """Make a release again into `out` and compare.

    Args:
        release: the folder of the release; `provenance.json` alone is enough.
        model, donor: where the sources lie, for those that came from a local folder.
        device: where layers run, in place of where they ran.
        inputs: where local files that the recipe names lie now: `calibration`, `importance`.

    Raises:
        CheckpointError: no provenance, or a source that is not the recorded one.
        TextError: a local file that the recipe names was not given, or is not the recorded one.
        UserError: whatever `run_recipe` raises.
    """
    recorded = read_provenance(release)
    check_inputs(recorded, inputs or {})
    recipe = recipe_of(recorded, release, inputs or {})
    model = model or origin_of(recorded.source, "--model")
    donor = donor or (origin_of(recorded.donor, "--donor") if recorded.donor else None)
    check_source(recorded.source, model)
    if recorded.donor and donor:
        check_source(recorded.donor, donor)
    place = place_of(device or recorded.device, recorded.compute)
    notes = differences(recorded) + [f"in {release}, {said}: changed after the run" for said in _changed(release, recorded)]
    for note in notes:
        report.note(note)
    before = torch.get_num_threads()
    try:
        run_recipe(recipe, model, out, recorded.threads, report, donor, recorded.accept_any, place)
    finally:
        torch.set_num_threads(before)
    return Reproduction(compare(recorded, read_provenance(out), release, out), notes)


def check_inputs(recorded: Provenance, inputs: Mapping[str, str]) -> None:
    """Whether every local file that the recipe named is here again. Raises TextError naming the option, or the file that is another."""
    for what, proof in recorded.inputs.items():
        if what not in inputs:
            raise TextError(
                f"the recipe reads {proof.name}, which lay on the machine that made the release",
                f"say where it lies now, with --{what} FILE",
            )
    for what, said in inputs.items():
        if what not in recorded.inputs:
            raise TextError(f"the recipe names no local file for {what}, {said} was given", f"leave --{what} out")
        path, wanted = Path(said).expanduser(), recorded.inputs[what]
        if not path.exists():
            raise TextError(f"there is no {path}{suggestion_beside(path)}", f"say where {wanted.name} lies")
        if (found := input_proof(path)).sha256 != wanted.sha256:
            raise TextError(
                f"{path} is not the {wanted.name} that the release was made with: SHA-256 {found.sha256}, {wanted.sha256} is recorded",
                "give that very file",
            )


def recipe_of(recorded: Provenance, release: Path, inputs: Mapping[str, str]) -> Recipe:
    """The recipe in a provenance, with local files where they lie now. Raises RecipeError where this version does not know it any more."""
    try:
        return Recipe.model_validate(with_inputs(recorded.recipe, inputs))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"the recipe in {release} does not fit this version: {place}: {first['msg']}",
            f"install qwench {recorded.versions.get('qwench', 'of that time')}, which made it",
        ) from None


def origin_of(source: SourceProof, option: str) -> str:
    """What to type for a source. Raises CheckpointError where it was a local folder, whose place nobody recorded."""
    if source.name.startswith(DEMO):
        return source.name
    if source.revision and ID.fullmatch(f"{source.name}@{source.revision}"):
        return f"{source.name}@{source.revision}"
    raise CheckpointError(f"the source {source.name} was a local folder", f"say where it lies now, with {option} FOLDER")


def check_source(recorded: SourceProof, model: str) -> None:
    """Whether a model is the one that was read. Raises CheckpointError naming the files that are not."""
    wrong = differing(recorded.files, source_proof(locate(model)).files)
    if wrong:
        raise CheckpointError(
            f"{model} is not the {recorded.name} that the release was made from: " + "; ".join(wrong[:4])
            + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""),
            "give the same revision of it",
        )  # fmt: skip


def differences(recorded: Provenance) -> list[str]:
    """What is different here and may change bits: versions, processor."""
    now = versions()
    notes = [
        f"{name} is {now.get(name, 'not installed')} here, {version} made the release"
        for name, version in recorded.versions.items()
        if now.get(name) != version
    ]
    notes += [
        f"{name} is {now[name]} here, and was not installed where the release was made"
        for name in now.keys() - recorded.versions
    ]
    here = machine()
    if here.processor != recorded.machine.processor:
        notes.append(f"the processor is {here.processor} here, {recorded.machine.processor} made the release")
    return notes


def _changed(release: Path, recorded: Provenance) -> list[str]:
    """Files of the release at hand that are not what its run wrote; those that are not at hand say nothing."""
    here = release_hashes(release)
    names = {file.name for file in here}
    return differing([file for file in recorded.files if file.name in names], here)


def compare(recorded: Provenance, made: Provenance, release: Path, out: Path) -> list[Compared]:
    """Every file of two runs, side by side, in the order of the first."""
    one, other = ({file.name: file.sha256 for file in side.files} for side in (recorded, made))
    found = []
    for name in dict.fromkeys([*one, *other]):
        different = one.get(name) != other.get(name) and name.endswith(".safetensors")
        found.append(Compared(name, one.get(name), other.get(name), differing_tensors(release, out, name) if different else []))
    return found


def differing_tensors(release: Path, out: Path, file: str) -> list[str]:
    """Tensors of one file whose bytes are not the same in both releases; nothing where the first is not at hand."""
    if not (release / file).is_file() or not (out / file).is_file() or "/" in file:
        return []
    with Checkpoint.open(release) as one, Checkpoint.open(out) as other:
        names = [entry.name for entry in one.tensors.values() if entry.file == file]
        return [name for name in names if name not in other.tensors or _differs(one, other, name)]


def _differs(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    first, second = one.tensors[name], other.tensors[name]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return True
    return any(bytes(a) != bytes(b) for a, b in zip(one.chunks(name), other.chunks(name), strict=True))
