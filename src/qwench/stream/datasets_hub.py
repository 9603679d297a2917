"""Data sets of the Hugging Face hub, and Parquet on this machine, through the `datasets` library (extra `data`).

    wikitext                          Salesforce/wikitext, config wikitext-2-raw-v1
    pile-10k                          NeelNanda/pile-10k
    org/name                          the newest commit
    org/name/config@revision          that config, of that branch, tag or commit

The commit is looked up first, and everything is read of that commit: records can name it. Records stream: only what the rows need is fetched. Where the hub cannot be reached,
what `datasets` has in its cache is used. Images are never decoded. Version 4 of the library stopped running the Python scripts that data sets used to carry; older ones are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwench.errors import TextError
from qwench.stream.tables import Placed

SHORT = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "pile-10k": ("NeelNanda/pile-10k", None)}
PART = r"[A-Za-z0-9][\w.-]*"
NAME = re.compile(rf"(?P<parts>{PART}(/{PART}){{0,2}})(@(?P<revision>[\w./-]+))?")
FIRST_VERSION = 4
"""Of `datasets`, without scripts."""
PARQUET_BATCH = 256
"""Records that are decoded at once; the library's own choice, a file's first row group, fails on a file without records."""


@dataclass(frozen=True)
class Table:
    """Records of a data set, to be read once.

    Attributes:
        name: data set, config, commit and split.
        records: with their places, as they are needed.
        revision: the commit, where the hub was asked.
        line_by_line: records are lines of documents, not documents.
    """

    name: str
    records: Iterator[Placed]
    revision: str | None = None
    line_by_line: bool = False


@dataclass(frozen=True)
class HubName:
    """A data set on the hub: `org/name`, one of its configs, and a branch, tag or commit."""

    repo: str
    config: str | None
    revision: str | None

    def __str__(self) -> str:
        return self.repo + (f"/{self.config}" if self.config else "") + (f"@{self.revision}" if self.revision else "")


def hub_name(text: str, revision: str | None) -> HubName:
    """What `text` names on the hub. Raises TextError where it names nothing, or two revisions."""
    match = NAME.fullmatch(text)
    if not match:
        raise TextError(
            f"{text!r} is neither a text on this machine nor a data set's name", "give a path, org/name or org/name/config"
        )
    if revision and match["revision"] and revision != match["revision"]:
        raise TextError(f"{text} names one revision and calibration.revision another, {revision}", "leave one of them out")
    head, *rest = match["parts"].split("/")
    if head in SHORT and len(rest) < 2:
        repo, config = SHORT[head]
        rest = rest or ([config] if config else [])
    else:
        repo, rest = "/".join([head, *rest[:1]]), rest[1:]
    return HubName(repo, rest[0] if rest else None, revision or match["revision"])


def hub_table(text: str, split: str, revision: str | None) -> Table:
    """Records of a data set on the hub. Raises TextError."""
    datasets = _library()
    wanted = hub_name(text, revision)
    commit = _commit(wanted)
    at = HubName(wanted.repo, wanted.config, commit or wanted.revision)
    found = _load(datasets, str(at), at.repo, name=at.config, split=split, revision=at.revision, streaming=commit is not None)
    return Table(f"{at}, {split}", _records(found, str(at)), commit, _is_wikitext(at.repo))


def folder_table(path: Path, split: str, config: str | None = None) -> Table:
    """Records of a folder that is laid out as the hub's repositories are. Raises TextError."""
    title = str(path / config) if config else str(path)
    found = _load(_library(), title, str(path.resolve()), name=config, split=split, streaming=True)
    name = f"{path.name}/{config}" if config else path.name
    return Table(f"{name}, {split}", _records(found, title), line_by_line=_is_wikitext(path.name))


def parquet_table(path: Path) -> Table:
    """Records of one Parquet file. Raises TextError."""
    found = _load(
        _library(),
        str(path),
        "parquet",
        data_files=str(path.resolve()),
        split="train",
        streaming=True,
        batch_size=PARQUET_BATCH,
    )
    return Table(path.name, _records(found, str(path)), line_by_line=_is_wikitext(path.name))


def _is_wikitext(name: str) -> bool:
    return name.rpartition("/")[2].lower().startswith("wikitext")


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise TextError(
            "data sets of the hub and Parquet files need the library `datasets`", "pip install 'qwench[data]'"
        ) from None
    if int(datasets.__version__.split(".")[0]) < FIRST_VERSION:
        raise TextError(
            f"datasets {datasets.__version__} would run scripts that data sets carry",
            f"pip install 'datasets>={FIRST_VERSION}'",
        )
    return datasets


def _commit(wanted: HubName) -> str | None:
    """The commit that a revision is now; None where the hub cannot be reached. Raises TextError where it says no."""
    import huggingface_hub
    from huggingface_hub import errors

    network: tuple[Any, ...] = (
        errors.HfHubHTTPError.__bases__
    )  # httpx's root of errors, whichever httpx the installed version uses
    try:
        commit: str | None = huggingface_hub.HfApi().dataset_info(wanted.repo, revision=wanted.revision).sha
        return commit
    except errors.GatedRepoError:
        mend = f"accept its terms at https://huggingface.co/datasets/{wanted.repo}, then `hf auth login`"
        raise TextError(f"data set {wanted.repo} is gated", mend) from None
    except errors.RepositoryNotFoundError:
        mend = "check the spelling; for a private data set `hf auth login` first; for a file give a path that exists"
        raise TextError(f"{wanted.repo} is no file or folder here, and the hub shows no such data set", mend) from None
    except errors.RevisionNotFoundError:
        what = f"data set {wanted.repo} has no revision {wanted.revision}"
        raise TextError(what, "name one of its branches, tags or commits, or leave it out") from None
    except errors.HFValidationError as error:
        raise TextError(f"{wanted.repo} is no data set's name: {error}", "give org/name, or a path that exists") from None
    except (OSError, *network):
        return None


def _load(datasets: Any, title: str, path: str, **asked: Any) -> Any:
    try:
        return datasets.load_dataset(path, **asked)
    except Exception as error:  # a library over many libraries: whatever they raise, its message says what there is
        raise _refused(title, error, streaming=asked["streaming"]) from error


def _records(found: Any, title: str) -> Iterator[Placed]:
    try:
        if hasattr(found, "to_iterable_dataset"):  # not streamed: from the library's cache
            found = found.to_iterable_dataset()
        if found.features:
            found = found.decode(False)
        for number, record in enumerate(found, start=1):
            yield f"record {number}", record
    except Exception as error:  # as above; files are opened as records are asked for
        raise _refused(title, error, streaming=True) from error


def _refused(title: str, error: Exception, streaming: bool) -> TextError:
    if not streaming:
        mend = "connect (and unset HF_HUB_OFFLINE), or fetch it elsewhere and give the folder"
        return TextError(
            f"{title} is no file or folder here, the hub cannot be reached, and `datasets` has no copy: {error}", mend
        )
    reason = str(error).strip() or type(error).__name__
    mend = "mend what it says; a config is named as org/name/config, a split as calibration.split"
    if "scripts are no longer supported" in reason:
        mend = "scripts are never run: name the hub's own conversion, org/name@refs/convert/parquet, or another data set"
    return TextError(f"data set {title} cannot be read: {reason}", mend)
