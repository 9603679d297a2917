"""Several releases of one source side by side: what each weighs, and what it lost.

Every file that is a language model by itself is one contender: a folder of safetensors files, or each model in a folder of GGUF files. A release with low-rank corrections (EoRA) stands
there twice: as engines run it that add none, and with them and their bytes. Numbers are only comparable on the same rows: a measurement in a release's record is used where its rows, its
source and its arithmetic are those of the others, else it is measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwench.checkpoint.hub import Located
from qwench.errors import CheckpointError
from qwench.formats.adapter import FOLDER
from qwench.result import FILE_NAME, Acceptance, Estimate, Evaluation, Figures, read_result
from qwench.steps.gguf.verify import files_to_verify, is_gguf

Measure = Callable[["Contender"], Evaluation]
"""Measures one contender on the rows that all are measured on."""


@dataclass(frozen=True)
class Contender:
    """One network that stands for itself.

    Attributes:
        name: what tables and plots call it.
        place: the folder of a safetensors release, or a GGUF file.
        bytes: of its tensor files, without corrections.
        recorded: what its record says of it, if it has one.
        source: what its record says it was made from.
        corrections: bytes of its low-rank corrections; 0 where it has none.
    """

    name: str
    place: Path
    bytes: int
    recorded: Evaluation | None = None
    source: str | None = None
    corrections: int = 0


@dataclass(frozen=True)
class Compared:
    """A contender and what was measured of it; `reused`: it came from the record."""

    contender: Contender
    evaluation: Evaluation
    reused: bool

    @property
    def acceptance(self) -> Estimate | None:
        """Of the release's head, at draft position 1."""
        return first_position(self.evaluation.acceptance_release)


def contenders(releases: Sequence[Path]) -> list[Contender]:
    """What is to be compared, in the order given; a name that occurs twice gets its folder's in front.

    Raises:
        CheckpointError: nothing there that can be measured, or the same thing twice.
        EngineError: a folder of GGUF files without a language model.
    """
    found = [contender for release in releases for contender in _of(release)]
    places = [contender.place.resolve() for contender in found]
    if twice := sorted({place.name for place in places if places.count(place) > 1}):
        raise CheckpointError(f"{', '.join(twice)} is given twice", "name each release once")
    return found


def _of(release: Path) -> list[Contender]:
    record = read_result(_folder(release)) if (_folder(release) / FILE_NAME).is_file() else None
    source = record.source.name if record else None
    if is_gguf(release):
        facts = {file.name: file.evaluation for file in record.files} if record else {}
        return [Contender(p.name, p, p.stat().st_size, facts.get(p.name), source) for p in files_to_verify(release)]
    sizes = [path.stat().st_size for path in release.glob("*.safetensors")]
    if not sizes:
        raise CheckpointError(f"{release} holds no safetensors and no GGUF file", "give the folders of releases, or GGUF files")
    beside = sum(path.stat().st_size for path in (release / FOLDER).glob("*.safetensors"))
    return [Contender(release.resolve().name, release, sum(sizes), record.evaluation if record else None, source, beside)]


def _folder(release: Path) -> Path:
    return release.parent if release.suffix == ".gguf" else release


def recorded_rows(found: Sequence[Contender], source: Located) -> bool:
    """Whether every contender was measured on the same rows against this source: then nothing needs to be measured."""
    usable = [_usable(contender, source) for contender in found]
    return all(usable) and len({(e.ids_sha256, e.compute_dtype) for e in usable if e}) == 1


def compare(
    found: Sequence[Contender], source: Located, ids_sha256: str | None, compute: str, measure: Measure
) -> list[Compared]:
    """Every contender with its figures.

    Args:
        ids_sha256: of the rows; None: those of the records, which `recorded_rows` has found to be the same.
        compute: what is computed in: `float32`.
        measure: called for those whose record does not say.
    """
    compared = []
    for contender in found:
        known = _usable(contender, source)
        same = known is not None and (ids_sha256 is None or (known.ids_sha256, known.compute_dtype) == (ids_sha256, compute))
        compared.append(Compared(contender, known if same and known else measure(contender), same))
    return compared


def _usable(contender: Contender, source: Located) -> Evaluation | None:
    """The recorded figures, where they are against this source, and of a release with corrections also those without."""
    found = contender.recorded
    if contender.source != source.name or found is None or not found.ids_sha256:
        return None
    return found if bool(found.corrections) == bool(found.without_corrections) else None


def comparison_data(compared: Sequence[Compared], source: Located, source_bytes: int) -> dict[str, Any]:
    """Everything as plain data: the source first, sizes in bytes, divergences in nats, shares from 0 to 1."""
    first = compared[0].evaluation
    return {
        "text": first.text,
        "ids_sha256": first.ids_sha256,
        "documents": first.documents,
        "length": first.length,
        "tokens": first.tokens,
        "compute": first.compute_dtype,
        "source": {
            "name": source.name,
            "bytes": source_bytes,
            "perplexity": first.perplexity_source.model_dump(),
            "acceptance": _by_position(first.acceptance_source),
        },
        "releases": [row for one in compared for row in _rows(one, source_bytes)],
    }


def _rows(one: Compared, source_bytes: int) -> list[dict[str, Any]]:
    """What stands there of one contender: itself, and where it has corrections itself with them."""
    found, contender = one.evaluation, one.contender
    if found.without_corrections is None:
        return [_row(one, contender.name, contender.bytes, found, source_bytes)]
    with_them = _row(one, f"{contender.name} with {FOLDER}", contender.bytes + contender.corrections, found, source_bytes)
    return [_row(one, contender.name, contender.bytes, found.without_corrections, source_bytes), with_them]


def _row(one: Compared, name: str, size: int, found: Figures, source_bytes: int) -> dict[str, Any]:
    return {
        "name": name,
        "bytes": size,
        "share": size / source_bytes,
        "corrected": found is one.evaluation and one.evaluation.corrections > 0,
        "kl": found.divergence.mean.model_dump(),
        "kl_p999": found.divergence.p999,
        "top1": found.top1_agreement.model_dump(),
        "perplexity": found.perplexity_release.model_dump(),
        "acceptance": _by_position(found.acceptance_release),
        "measured": "recorded" if one.reused else "now",
    }


def _by_position(side: Acceptance | None) -> list[dict[str, float]]:
    return [estimate.model_dump() for estimate in side.by_position] if side else []


def first_position(side: Acceptance | None) -> Estimate | None:
    return side.by_position[0] if side and side.by_position else None


def comparison_rows(data: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The table: name, bytes, % of the source, KL, p99.9, top-1, perplexity, acceptance at position 1; smallest first, the source last."""
    rows = [
        (
            row["name"], row["bytes"], f"{row['share']:.1%}", _both(row["kl"], ".5f"), f"{row['kl_p999']:.3f}",
            _both(row["top1"], ".2%"), f"{row['perplexity']['mean']:.3f}", _both(row["acceptance"][0], ".1%") if row["acceptance"] else None,
        )
        for row in sorted(data["releases"], key=lambda row: row["bytes"])
    ]  # fmt: skip
    source = data["source"]
    drafts = _both(source["acceptance"][0], ".1%") if source["acceptance"] else None
    return [*rows, (source["name"], source["bytes"], "100.0%", "0", "0", "100%", f"{source['perplexity']['mean']:.3f}", drafts)]


def _both(estimate: dict[str, float], digits: str) -> str:
    return f"{estimate['mean']:{digits}} ± {estimate['standard_error']:{digits}}"
