"""Where a release came from, exactly enough to make it again: `provenance.json`, the last file that a run writes into it.

It holds the recipe as data with every default filled in, the source and its hashes, what was calibrated on, versions, seeds, threads, machine and times,
and the SHA-256 of every file that the run wrote. Left out of that list are the files that change after a run: the record, which grows as a release is measured,
the card with its pictures, and this file.

How a file of the source was hashed is said beside its hash:

    whole      SHA-256 of all its bytes: small files always, tensors where the source is at most 4 GiB
    hub        the hub's own SHA-256 of the whole file, as its cache on this machine names it: nothing is read
    sampled    SHA-256 of the header of a safetensors file and of the first and last 4 KiB of each tensor: it tells another model, another training, a resave;
               it would miss a change in the middle of a tensor

A local source is named by its folder alone, and so is a local file that the recipe reads (calibration text, importance): where it lay is nobody else's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qwench import __version__
from qwench.checkpoint.folder import CONFIG_NAME, INDEX_NAME
from qwench.checkpoint.header import read_header
from qwench.checkpoint.hub import Located
from qwench.checkpoint.sidecars import SIDECARS
from qwench.errors import CheckpointError
from qwench.recipe import Recipe
from qwench.recipe.shared import DONOR, local_inputs, public_data
from qwench.result import FILE_NAME as RECORD
from qwench.result import Record, Result, check_format
from qwench.result.record import NO_UNIT, Bytes, Seconds, Tensors, unit

FILE_NAME = "provenance.json"
FORMAT = 2
"""Of the file; see `qwench.result.release.FORMAT`."""
CHANGING = {FILE_NAME, RECORD, RECORD + ".new", "README.md", "report.html"}
"""Files of a release that are not what a run alone made of its source."""
CHANGING_FOLDERS = {"card"}
WHOLE = 4 << 30
"""Bytes of tensors up to which the source is read once more to hash it: some seconds."""
SAMPLE = 4096
BLOB = re.compile(r"[0-9a-f]{64}")
PACKAGES = ("torch", "transformers", "numpy", "safetensors", "compressed-tensors", "gguf", "xllamacpp")

How = Literal["whole", "hub", "sampled"]


class FileHash(Record):
    """A file and the SHA-256 that says which one it was."""

    name: str
    """Its path in its folder."""
    bytes: Bytes
    """Its size."""
    sha256: str
    """In hexadecimal digits."""
    how: How = "whole"
    """What the hash covers: `whole`, all bytes; `hub`, the hub's own SHA-256 of all bytes; `sampled`, header and both ends of each tensor."""


class SourceProof(Record):
    """A checkpoint that was read."""

    name: str
    """Hub id, or the folder's name alone."""
    revision: str | None = None
    """Its commit, where it came from the hub."""
    files: list[FileHash]
    """What was read of it."""


class InputProof(Record):
    """A file or folder that a recipe names by its path."""

    name: str
    """Without the place where it lay."""
    sha256: str | None = None
    """Of the file; null of a folder, whose text the hash of the rows stands for."""


class Machine(Record):
    """What ran it, without its name."""

    platform: str
    """As Python says it."""
    processor: str
    """Its name."""
    cores: Annotated[int, unit("cores")]
    """That we could use."""
    memory: Bytes
    """Of the machine."""


class Provenance(Record):
    """How a release was made: `provenance.json`, from which `qwench reproduce` makes it again."""

    format: Annotated[int, unit(NO_UNIT)] = FORMAT
    """Of this file; newer ones are refused."""
    recipe: dict[str, Any]
    """With all defaults; of local files the names alone."""
    inputs: dict[str, InputProof] = Field(default_factory=dict)
    """Local files that the recipe names: `calibration`, `importance`. Who makes the release again says where they lie."""
    accept_any: bool = False
    """Whether the run was told to finish whatever its MTP head is worth."""
    source: SourceProof
    """What the release was made from."""
    donor: SourceProof | None = None
    """What was grafted from; null where nothing was."""
    calibration_text: str | None = None
    """The name of the calibration text; null without calibration."""
    calibration_sha256: str | None = None
    """SHA-256 of its file."""
    rows_sha256: str | None = None
    """SHA-256 of the calibration rows' token ids."""
    versions: dict[str, str]
    """Of Python, of this package and of those that compute."""
    seeds: Annotated[dict[str, int], unit(NO_UNIT)] = Field(default_factory=dict)
    """Every seed in the recipe, by its place there."""
    threads: Annotated[int, unit("threads")]
    """Of torch, which decide the order of its sums; bits are only promised with the same number."""
    device: str = "cpu"
    """Where layers ran."""
    compute: str = "float32"
    """In which numbers."""
    machine: Machine
    """What ran it."""
    started: str
    """When the command was given, UTC, ISO 8601."""
    finished: str
    """When this file was written, UTC, ISO 8601."""
    seconds: Seconds
    """Of the run that finished; an earlier one that was stopped is not in it, `resumed_tensors` says how much it had written."""
    resumed_tensors: Tensors = 0
    """That an earlier, unfinished run had written."""
    files: list[FileHash]
    """Every file that the run wrote, but those that change afterwards: the record, the card, this file."""


@dataclass(frozen=True)
class Origin:
    """What a run knows before its files are written.

    Attributes:
        recipe, accept_any: what was asked for.
        source, donor: what was read.
        started: when the command was given.
    """

    recipe: Recipe
    source: Located
    donor: Located | None
    accept_any: bool
    started: datetime


def seal(folder: Path, origin: Origin, result: Result) -> dict[str, bytes]:
    """The provenance of the release that lies finished in `folder`, as a file for it: name -> content."""
    calibration, run = result.calibration, result.run
    provenance = Provenance(
        recipe=public_data(origin.recipe),
        inputs=input_proofs(origin.recipe),
        accept_any=origin.accept_any,
        source=source_proof(origin.source),
        donor=source_proof(origin.donor) if origin.donor else None,
        calibration_text=calibration.text if calibration else None,
        calibration_sha256=calibration.text_sha256 if calibration else None,
        rows_sha256=calibration.ids_sha256 if calibration else None,
        versions=versions(),
        seeds=dict(seeds(public_data(origin.recipe))),
        threads=run.threads,
        device=run.device,
        compute=run.compute,
        machine=machine(),
        started=_stamp(origin.started),
        finished=_stamp(datetime.now(UTC)),
        seconds=round(run.seconds, 3),
        resumed_tensors=run.resumed_tensors,
        files=release_hashes(folder),
    )
    return {FILE_NAME: (provenance.model_dump_json(indent=1) + "\n").encode()}


def read_provenance(folder: Path) -> Provenance:
    """The provenance of a release. Raises CheckpointError where there is none, or it is newer than we are, or not ours."""
    path = folder / FILE_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        check_format(path, data, FORMAT)
        return Provenance.model_validate(data)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} holds no {FILE_NAME}", "give the folder of a release that this version of `qwench run` made"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not a provenance of this version: {error}", "fetch the release again") from None


def release_hashes(folder: Path) -> list[FileHash]:
    """Every file of a release that a run alone decides, by name."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not _changes(path.relative_to(folder)))
    return [whole_hash(path, path.relative_to(folder).as_posix()) for path in sorted(paths)]


def _changes(name: Path) -> bool:
    return name.as_posix() in CHANGING or name.parts[0] in CHANGING_FOLDERS


def input_proofs(recipe: Recipe) -> dict[str, InputProof]:
    """The local files that a recipe names, but the donor, which is a source with a proof of its own."""
    return {what: input_proof(path) for what, path in local_inputs(recipe).items() if what != DONOR}


def input_proof(path: Path) -> InputProof:
    """One of them."""
    name = path.resolve().name
    return InputProof(name=name, sha256=whole_hash(path, name).sha256 if path.is_file() else None)


def source_proof(located: Located) -> SourceProof:
    """The files of a checkpoint, hashed as far as is cheap."""
    tensors = sorted(located.path.glob("*.safetensors"))
    beside = [path for name in sorted({CONFIG_NAME, INDEX_NAME, *SIDECARS}) if (path := located.path / name).is_file()]
    whole = sum(path.stat().st_size for path in tensors) <= WHOLE
    files = [file_proof(path, whole=whole) for path in (*beside, *tensors)]
    return SourceProof(name=located.name, revision=located.revision, files=files)


def file_proof(path: Path, *, whole: bool) -> FileHash:
    """One file of a source; `whole`: read all of it, if it holds tensors too."""
    size, blob = path.stat().st_size, path.resolve().name
    if path.is_symlink() and BLOB.fullmatch(blob):
        return FileHash(name=path.name, bytes=size, sha256=blob, how="hub")
    if path.suffix == ".safetensors" and not whole:
        return FileHash(name=path.name, bytes=size, sha256=sampled_sha256(path), how="sampled")
    return whole_hash(path, path.name)


def whole_hash(path: Path, name: str) -> FileHash:
    with path.open("rb") as file:
        return FileHash(name=name, bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def sampled_sha256(path: Path) -> str:
    """SHA-256 of a safetensors file's header and of both ends of each of its tensors, in the order of the names. Raises CheckpointError for a damaged header."""
    digest, entries = hashlib.sha256(), sorted(read_header(path), key=lambda entry: entry.name)
    with path.open("rb", buffering=0) as file:
        digest.update(file.read(min(entry.start for entry in entries) if entries else -1))
        for entry in entries:
            for start in {entry.start, max(entry.start, entry.start + entry.nbytes - SAMPLE)}:
                file.seek(start)
                digest.update(file.read(min(SAMPLE, entry.start + entry.nbytes - start)))
    return digest.hexdigest()


def differing(recorded: Sequence[FileHash], found: Sequence[FileHash]) -> list[str]:
    """Sentences about files that are not those recorded; empty where all are. Hashes that cover different things are not compared, sizes are."""
    now, said = {file.name: file for file in found}, list[str]()
    for file in recorded:
        other = now.get(file.name)
        if other is None:
            said.append(f"{file.name} is missing")
        elif other.bytes != file.bytes:
            said.append(f"{file.name} has {other.bytes:,} bytes, {file.bytes:,} are recorded")
        elif _comparable(file, other) and other.sha256 != file.sha256:
            said.append(f"{file.name} has SHA-256 {other.sha256[:12]}…, {file.sha256[:12]}… is recorded")
    return said


def _comparable(one: FileHash, other: FileHash) -> bool:
    """Whether two hashes are of the same bytes: the hub's is of the whole file, as ours is."""
    return ("sampled" in (one.how, other.how)) == (one.how == other.how == "sampled")


def versions() -> dict[str, str]:
    """Of Python, this package and what it computes with; packages that are not installed are not named."""
    found = {"python": platform.python_version(), "qwench": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def seeds(data: Any, place: str = "") -> Iterator[tuple[str, int]]:
    """Every `seed` in a recipe's data, by its place: `calibration.seed`."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        where = f"{place}.{key}" if place else str(key)
        if key == "seed" and isinstance(value, int):
            yield where, value
        else:
            yield from seeds(value, where)


def machine() -> Machine:
    """This machine, without its name."""
    return Machine(
        platform=f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", "),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")
