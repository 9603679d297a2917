"""Folders and hub ids. The hub is played by a folder: `snapshot_download` is replaced by one that takes the files from there."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from qwench.checkpoint.hub import Located, locate
from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.sidecars import sidecars_of
from qwench.errors import CheckpointError
from tests.support.files import INDEX, write_folder

TRUNK, HEAD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DESCRIPTION = {"config.json", INDEX, "tokenizer.json", "LICENSE"}


class Hub:
    """A hub with one model.

    Attributes:
        published: the files of the model.
        fetched: per call, the revision asked for and the files handed out.
    """

    def __init__(self, published: Path, cache: Path) -> None:
        self.published, self.fetched = published, list[tuple[str | None, set[str]]]()
        self.snapshot = cache / "models--Qwen--Qwen3.5-9B" / "snapshots" / COMMIT

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        assert repo_id == "Qwen/Qwen3.5-9B"
        names = [str(p.relative_to(self.published)) for p in self.published.rglob("*") if p.is_file()]
        chosen = list(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        for name in chosen:
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.published / name, self.snapshot / name)
        self.fetched.append((revision, set(chosen)))
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    trunk, head = {"model.norm.weight": torch.ones(3)}, {"mtp.fc.weight": torch.ones(2, 5)}
    published = write_folder(tmp_path / "published", {TRUNK: trunk, HEAD: head})
    others = [
        "tokenizer.json",
        "LICENSE",
        "README.md",
        "modeling_qwen.py",
        "pytorch_model.bin",
        "original/model.safetensors",
        "original/config.json",
    ]
    (published / "original").mkdir()
    for name in others:
        (published / name).write_text(name)
    hub = Hub(published, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def no_download(*_: Any, **__: Any) -> str:
    raise AssertionError("the hub was asked")


def test_the_library_takes_what_we_pass() -> None:
    parameters = inspect.signature(huggingface_hub.snapshot_download).parameters
    assert {"repo_id", "revision", "allow_patterns", "ignore_patterns"} <= parameters.keys()


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_download)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate(str(tmp_path / "org" / "name")) == Located(tmp_path / "org" / "name", "name", None)
    assert locate("org/name") == Located(Path("org/name"), "name", None)  # it could be an id as well
    assert locate("~") == Located(Path.home(), Path.home().name, None)


def test_a_folder_of_the_cache_tells_what_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen3.5--9B" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    assert locate(str(folder)) == Located(folder, "Qwen/Qwen3.5--9B", COMMIT)


def test_everything_but_pickles_and_code_is_fetched(hub: Hub) -> None:
    located = locate("Qwen/Qwen3.5-9B")
    assert located == Located(hub.snapshot, "Qwen/Qwen3.5-9B", COMMIT)
    assert hub.fetched == [(None, DESCRIPTION), (COMMIT, {TRUNK, HEAD})]
    assert Checkpoint.open(located.path).tensors.keys() == {"model.norm.weight", "mtp.fc.weight"}
    assert sidecars_of(located.path).keys() == {"tokenizer.json", "LICENSE"}


def test_only_shards_with_wanted_tensors_are_fetched(hub: Hub) -> None:
    def wanted(name: str) -> bool:
        return name.startswith("mtp.")

    located = locate("Qwen/Qwen3.5-9B", wanted=wanted)
    assert hub.fetched == [(None, DESCRIPTION), (COMMIT, {HEAD})]
    assert torch.equal(Checkpoint.open(located.path, wanted).read("mtp.fc.weight"), torch.ones(2, 5))


def test_config_without_weights(hub: Hub) -> None:
    assert locate("Qwen/Qwen3.5-9B", weights=False).revision == COMMIT
    assert hub.fetched == [(None, DESCRIPTION)]


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/7", COMMIT[:7]])
def test_the_revision_is_asked_for_and_then_its_commit(hub: Hub, revision: str) -> None:
    assert locate(f"Qwen/Qwen3.5-9B@{revision}").revision == COMMIT
    assert [asked for asked, _ in hub.fetched] == [revision, COMMIT]


def test_a_model_of_one_file(hub: Hub) -> None:
    for name in (INDEX, HEAD, TRUNK):
        (hub.published / name).unlink()
    write_folder(hub.published, {"model.safetensors": {"model.norm.weight": torch.ones(3)}})
    assert Checkpoint.open(locate("Qwen/Qwen3.5-9B").path).tensors.keys() == {"model.norm.weight"}
    assert hub.fetched[1] == (COMMIT, {"model.safetensors"})


def test_a_model_of_pickles_only(hub: Hub) -> None:
    for name in (INDEX, HEAD, TRUNK):
        (hub.published / name).unlink()
    assert "hub model Qwen/Qwen3.5-9B has no safetensors files" in refusal("Qwen/Qwen3.5-9B").what
    assert not any("pytorch_model.bin" in files for _, files in hub.fetched)


def test_no_wanted_tensor(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=f"{INDEX} names none of the tensors that are needed"):
        locate("Qwen/Qwen3.5-9B", wanted=lambda name: False)
    assert len(hub.fetched) == 1


def test_an_index_that_leaves_the_folder_fetches_nothing(hub: Hub) -> None:
    (hub.published / INDEX).write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    assert "../../secret.safetensors" in refusal("Qwen/Qwen3.5-9B").what
    assert len(hub.fetched) == 1


def refusal(model: str) -> CheckpointError:
    """The error, which says how to mend it."""
    with pytest.raises(CheckpointError) as caught:
        locate(model)
    assert caught.value.mend
    return caught.value


@pytest.mark.parametrize(
    "model", ["Qwen3.5-9B", "./nowhere/model", "/data/nowhere", "a/b/c", "a/b@", "", "org/na me", "-a/b", "@main"]
)
def test_neither_folder_nor_id(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_download)
    assert refusal(model).what == f"{model!r} is neither a folder nor a hub id"


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """An error as the library raises it. (Its constructors want a response of whichever HTTP library it uses.)"""
    error = kind.__new__(kind)
    Exception.__init__(error, "server says no")
    return error


class NetworkError(errors.HfHubHTTPError.__bases__[0]):  # type: ignore[misc]
    """What the HTTP library itself raises, such as for a broken proxy."""

    def __init__(self) -> None:
        Exception.__init__(self, "proxy is broken")


@pytest.mark.parametrize(
    ("error", "what", "mend"),
    [
        (http_error(errors.GatedRepoError), "hub model org/name@v1 is gated", "https://huggingface.co/org/name"),
        (
            http_error(errors.RepositoryNotFoundError),
            "org/name@v1 is no folder here, and the hub shows no such model",
            "spelling",
        ),
        (http_error(errors.RevisionNotFoundError), "hub model org/name has no revision v1", "branches"),
        (errors.HFValidationError("too long"), "org/name@v1 is no hub id: too long", "org/name"),
        (
            errors.LocalEntryNotFoundError("no"),
            "org/name@v1 is no folder here, and the hub cannot be reached",
            "HF_HUB_OFFLINE",
        ),
        (errors.OfflineModeIsEnabled("no"), "org/name@v1 is no folder here, and the hub cannot be reached", "HF_HUB_OFFLINE"),
        (
            OSError(28, "No space left on device"),
            "org/name@v1 cannot be fetched: [Errno 28] No space left on device",
            "try again",
        ),
        (NetworkError(), "org/name@v1 cannot be fetched: proxy is broken", "try again"),
    ],
)
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, error: Exception, what: str, mend: str) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused = refusal("org/name@v1")
    assert what in refused.what
    assert mend in refused.mend


def test_offline_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library itself, told to stay offline, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "org/name is no folder here, and the hub cannot be reached" in refusal("org/name").what
