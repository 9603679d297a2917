"""From what a person types to a folder: a path, or the id of a model on the Hugging Face hub.

    /data/Qwen3.5-9B               a folder
    Qwen/Qwen3.5-9B                the hub, newest revision
    Qwen/Qwen3.5-9B@1a2b3c         the hub, that branch, tag or commit
    demo:dense, demo:moe           the small trained checkpoints that the package carries

A folder that exists wins over an id that reads the same. From the hub we fetch config, index and sidecars first, and then only the shards that hold a wanted tensor, all of the
commit that the first fetch saw. Pickles and Python files are never fetched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from qwench.checkpoint.folder import CONFIG_NAME, INDEX_NAME, Wanted, read_index
from qwench.checkpoint.sidecars import SIDECARS
from qwench.errors import CheckpointError, suggestion, suggestion_beside

ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
DEMO = "demo:"
MODELOPT = "hf_quant_config.json"
"""Where older releases by ModelOpt say how they are quantized; engines look there too."""
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Located:
    """A model that is on this machine.

    Attributes:
        path: its folder.
        name: its hub id, or the name of the folder.
        revision: the commit, where it came from the hub.
    """

    path: Path
    name: str
    revision: str | None = None


def locate(model: str, *, weights: bool = True, wanted: Wanted | None = None) -> Located:
    """The folder of a model; fetches from the hub what is not there yet.

    Args:
        model: a folder, or `org/name` or `org/name@revision`.
        weights: whether tensors are needed, not only config and tokenizer.
        wanted: which tensors are needed, by name; None: all. Hand the same to `Checkpoint.open`.

    Raises:
        CheckpointError: neither a folder nor an id, or the hub does not give it.
    """
    folder = Path(model).expanduser()
    if model and folder.exists():
        return _local(folder)
    if model.startswith(DEMO):
        return _carried(model)
    match = ID.fullmatch(model)
    if not match:
        what = f"{model!r} is neither a folder nor a hub id{suggestion_beside(folder)}"
        raise CheckpointError(what, "give a folder that exists, or org/name, or org/name@revision")
    repo, revision = match["repo"], match["revision"]
    path = _fetch(repo, revision, [CONFIG_NAME, INDEX_NAME, MODELOPT, *SIDECARS])
    commit = path.name if COMMIT.fullmatch(path.name) else revision
    if weights:
        path = _fetch(repo, commit, _shards(path, wanted))
        if not any(path.glob("*.safetensors")):
            mend = "name a revision that has them (org/name@revision), or convert the checkpoint"
            raise CheckpointError(f"hub model {repo} has no safetensors files", mend)
    return Located(path, repo, commit)


def _carried(model: str) -> Located:
    """A checkpoint of the package's own. Raises CheckpointError for a name that it does not have."""
    home = Path(str(resources.files("qwench"))) / "demo"
    names = sorted(path.parent.name for path in home.glob(f"*/{CONFIG_NAME}"))
    if model.removeprefix(DEMO) not in names:
        raise CheckpointError(
            f"there is no {model}{suggestion(model.removeprefix(DEMO), names)}",
            f"the package carries {', '.join(DEMO + name for name in names)}",
        )
    return Located(home / model.removeprefix(DEMO), model)


def _local(folder: Path) -> Located:
    """A folder; one in the hub's cache (`models--org--name/snapshots/COMMIT`) tells its name and commit."""
    place = folder.resolve()
    if place.parent.name == "snapshots" and COMMIT.fullmatch(place.name):
        cache = place.parent.parent.name
        name = cache.removeprefix("models--").replace("--", "/", 1) if cache.startswith("models--") else place.name
        return Located(folder, name, place.name)
    return Located(folder, place.name)


def _shards(path: Path, wanted: Wanted | None) -> list[str]:
    """The files that hold wanted tensors; without an index every safetensors file."""
    if not (path / INDEX_NAME).is_file():
        return ["*.safetensors"]
    weight_map = read_index(path / INDEX_NAME)
    shards = sorted({file for name, file in weight_map.items() if wanted is None or wanted(name)})
    if not shards:
        raise CheckpointError(
            f"{path / INDEX_NAME} names none of the tensors that are needed", "name a checkpoint that has them"
        )
    return shards


def _fetch(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Fetch these files of the top folder; the path of the snapshot."""
    import huggingface_hub  # a second of start-up that local folders need not pay
    from huggingface_hub.errors import HfHubHTTPError

    network: tuple[Any, ...] = HfHubHTTPError.__bases__  # httpx's root of errors, whichever httpx the installed version uses
    try:
        # `*` crosses `/` in the hub's patterns: subfolders hold other formats of the same weights
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"])
        )
    except (OSError, ValueError, *network) as error:
        raise _explained(error, repo, revision) from error


def _explained(error: Exception, repo: str, revision: str | None) -> CheckpointError:
    """What the hub's library says, in our words. The order matters: a gated model is a missing one to the library."""
    from huggingface_hub import errors

    name = f"{repo}@{revision}" if revision else repo
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"hub model {name} is gated", f"accept its terms at https://huggingface.co/{repo}, then `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        mend = "check the spelling; for a private model `hf auth login` first; for a folder give a path that exists"
        return CheckpointError(f"{name} is no folder here, and the hub shows no such model", mend)
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"hub model {repo} has no revision {revision}", "name one of its branches, tags or commits, or leave @revision out"
        )
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"{name} is no hub id: {error}", "give a folder that exists, or org/name")
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        mend = "connect (and unset HF_HUB_OFFLINE), or fetch it elsewhere and give the folder"
        return CheckpointError(f"{name} is no folder here, and the hub cannot be reached", mend)
    return CheckpointError(
        f"hub model {name} cannot be fetched: {error}", "try again, or fetch it elsewhere and give the folder"
    )
