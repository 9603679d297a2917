"""A finished release onto the Hugging Face hub: `qwench push`.

Tensor files go one by one, each in a commit of its own, and what makes a folder a model (config, index, tokenizer, card) goes last and together: whoever looks in between
sees no model that is half there. A push that was stopped goes on with the same command: files whose SHA-256 the hub already has are left out, and within a file the
hub's library continues where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwench.checkpoint.folder import CONFIG_NAME, some
from qwench.checkpoint.hub import ID
from qwench.errors import CheckpointError, OutputError
from qwench.result import FILE_NAME, Result, read_result
from qwench.steps import provenance
from qwench.steps.provenance import read_provenance, release_hashes

LARGE = (".safetensors", ".gguf")
UNFINISHED = (".new", ".partial", ".lock", ".tmp")


@dataclass(frozen=True)
class Item:
    """A file that belongs to a release: its name in the folder and in the repository, and its bytes."""

    name: str
    bytes: int

    @property
    def large(self) -> bool:
        return self.name.endswith(LARGE)


@dataclass(frozen=True)
class Pushed:
    """What came of it: where it lies, what went there now, what lay there already."""

    url: str
    sent: list[Item]
    there: list[Item]


def files_to_push(release: Path) -> list[Item]:
    """The files of a finished release: tensor files first.

    Raises:
        CheckpointError: it is none: no record, a file missing or of another size or hash than the run wrote.
    """
    result = read_result(release)
    if not (release / CONFIG_NAME).is_file():
        raise CheckpointError(f"{release} holds no {CONFIG_NAME}: it is no finished release", "make the release again")
    _check_sizes(release, result)
    if (release / provenance.FILE_NAME).is_file():
        _check_hashes(release)
    paths = (path for path in sorted(release.rglob("*")) if path.is_file() and _goes(path.relative_to(release)))
    items = [Item(path.relative_to(release).as_posix(), path.stat().st_size) for path in paths]
    return sorted(items, key=lambda item: (not item.large, item.name))


def _goes(name: Path) -> bool:
    return not any(part.startswith(".") or part == "__pycache__" for part in name.parts) and not name.name.endswith(UNFINISHED)


def _check_sizes(release: Path, result: Result) -> None:
    wrong = []
    for file in result.files:
        path = release / file.name
        if not path.is_file():
            wrong.append(f"{file.name} is missing")
        elif path.stat().st_size != file.bytes:
            wrong.append(f"{file.name} has {path.stat().st_size:,} bytes of {file.bytes:,}")
    if wrong:
        raise CheckpointError(
            f"{release} is no finished release: {some(wrong)}", "run the command that made it again, or fetch it again"
        )


def _check_hashes(release: Path) -> None:
    wrong = provenance.differing(read_provenance(release).files, release_hashes(release))
    if wrong:
        raise CheckpointError(
            f"{release} is not what its run wrote: {some(wrong)}",
            "make the release again, or take provenance.json out and answer for it",
        )


def warnings(release: Path) -> list[str]:
    """What a careful person would do before publishing."""
    result, said = read_result(release), list[str]()
    networks = [file for file in result.files if file.content in ("model", "trunk")]
    if result.evaluation is None and not any(file.evaluation for file in networks):
        said.append("its quality was not measured: `qwench eval`")
    if not result.verifications:
        said.append("no engine was asked whether it loads: `qwench verify`")
    if not (release / "README.md").is_file():
        said.append("it has no card: `qwench card`")
    elif (release / "README.md").stat().st_mtime < (release / FILE_NAME).stat().st_mtime - 1:
        said.append("its card is older than its record: `qwench card`")
    if result.acceptance and result.acceptance.overridden:
        said.append("its MTP head missed the recipe's floor, and --accept-any let it pass")
    return said


def push(
    release: Path, repository: str, items: Sequence[Item], private: bool, tell: Callable[[int, int, str], None], api: Any = None
) -> Pushed:
    """Upload a release.

    Args:
        repository: `org/name`; it is made where there is none.
        items: of `files_to_push`.
        private: make it so that only its owner sees it; an existing repository stays as it is.
        tell: hears of bytes done, of how many, and of which file.
        api: what speaks with the hub; None: `huggingface_hub.HfApi`.

    Raises:
        OutputError: the name is none, or the hub does not take it.
    """
    match = ID.fullmatch(repository)
    if not match or match["revision"]:
        raise OutputError(f"{repository!r} is no name of a repository", "give OWNER/NAME")
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    total, done, sent, there = sum(item.bytes for item in items), 0, list[Item](), list[Item]()
    with _explained(repository):
        url = str(api.create_repo(repository, private=private, exist_ok=True, repo_type="model"))
        known = _known(api, repository)
        for item in items:
            if _same(release / item.name, known.get(item.name)):
                there.append(item)
            elif item.large:
                tell(done, total, item.name)
                api.upload_file(
                    path_or_fileobj=release / item.name, path_in_repo=item.name, repo_id=repository, repo_type="model",
                    commit_message=f"Add {item.name}",
                )  # fmt: skip
                sent.append(item)
            else:
                continue
            done += item.bytes
        small = [item for item in items if not item.large and item not in there]
        if small:
            tell(done, total, "config, tokenizer, card")
            names = [item.name for item in small]
            api.upload_folder(
                repo_id=repository, repo_type="model", folder_path=release, allow_patterns=names, commit_message="Add config, tokenizer and card"
            )  # fmt: skip
    tell(total, total, repository)
    return Pushed(url, [*sent, *small], there)


def _known(api: Any, repository: str) -> dict[str, Any]:
    """The files of the repository, by name."""
    tree = api.list_repo_tree(repository, recursive=True, repo_type="model")
    return {entry.path: entry for entry in tree if getattr(entry, "size", None) is not None}


def _same(path: Path, known: Any) -> bool:
    """Whether the hub has these very bytes: by SHA-256 where it keeps them as a large file, by git's hash of a blob elsewhere."""
    if known is None or known.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        if known.lfs is not None:
            return bool(hashlib.file_digest(file, "sha256").hexdigest() == known.lfs.sha256)
        blob = hashlib.sha1(b"blob %d\0" % known.size)
        blob.update(file.read())
        return bool(blob.hexdigest() == known.blob_id)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """What the hub's library raises, as an OutputError."""
    from huggingface_hub import errors

    network: tuple[Any, ...] = errors.HfHubHTTPError.__bases__
    try:
        yield
    except (OSError, ValueError, *network) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
            raise OutputError(
                f"the hub does not know who pushes to {repository}", "`hf auth login`, with a token that may write"
            ) from None
        if status in (403, 404):
            raise OutputError(
                f"you may not write to {repository}", "check the owner's name, and that your token may write"
            ) from None
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutputError(
            f"{repository} was not pushed to the end: {first}", "give the same command again: what went is kept"
        ) from error
