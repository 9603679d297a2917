"""Publishing, against a stand-in of the hub that keeps files in a folder: order, resuming, refusals."""

from __future__ import annotations

import hashlib
import json
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwench import cli
from qwench.display import Report
from qwench.errors import CheckpointError, OutputError
from qwench.recipe import parse_recipe
from qwench.run import run_recipe
from qwench.steps.publishing.push import files_to_push, push, warnings
from tests.support.tiny import write_tiny

QUIET = Report("test", "bytes", None)
RECIPE = "name: t\nsteps:\n  - quantize: {rules: [{roles: [mlp.*], scheme: int4}]}\n  - export: {shard_size: 500000B}\nacceptance: off\n"


class Hub:
    """What `HfApi` is to us; it fails as often as it is told to, before the upload with that number."""

    def __init__(self, place: Path, fail_at: int | None = None, error: Exception | None = None) -> None:
        self.place, self.fail_at, self.error = place, fail_at, error
        self.commits: list[list[str]] = []
        self.made: list[tuple[str, bool]] = []

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool, repo_type: str) -> str:
        assert exist_ok and repo_type == "model"
        if self.error and self.fail_at is None:
            raise self.error
        self.made.append((repository, private))
        self.place.mkdir(exist_ok=True)
        return f"https://hub/{repository}"

    def list_repo_tree(self, repository: str, *, recursive: bool, repo_type: str) -> list[Any]:
        assert recursive
        found: list[Any] = [SimpleNamespace(path="card", tree_id="0")]  # a folder has no size
        for path in self.place.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                large = SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) if path.suffix == ".safetensors" else None
                blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                name = path.relative_to(self.place).as_posix()
                found.append(SimpleNamespace(path=name, size=len(data), lfs=large, blob_id=blob))
        return found

    def upload_file(
        self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str, repo_type: str, commit_message: str
    ) -> None:
        self._commit({path_in_repo: path_or_fileobj})

    def upload_folder(
        self, *, repo_id: str, repo_type: str, folder_path: Path, allow_patterns: list[str], commit_message: str
    ) -> None:
        names = [p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*") if p.is_file()]
        self._commit({n: folder_path / n for n in names if any(fnmatch(n, pattern) for pattern in allow_patterns)})

    def _commit(self, files: dict[str, Path]) -> None:
        if self.fail_at == len(self.commits):
            raise self.error or ConnectionError("the line is dead")
        self.commits.append(sorted(files))
        for name, path in files.items():
            (self.place / name).parent.mkdir(exist_ok=True)
            (self.place / name).write_bytes(path.read_bytes())


@pytest.fixture
def release(tmp_path: Path) -> Path:
    run_recipe(parse_recipe(RECIPE, "t"), str(write_tiny(tmp_path / "tiny")), tmp_path / "out", 1, QUIET, accept_any=True)
    (tmp_path / "out" / "README.md").write_text("# card")
    return tmp_path / "out"


def quiet(done: int, total: int, what: str) -> None:
    assert 0 <= done <= total


def test_tensors_go_first_and_what_makes_it_a_model_goes_last(release: Path, tmp_path: Path) -> None:
    (release / ".DS_Store").write_text("x")
    (release / "result.json.new").write_text("x")
    hub, items = Hub(tmp_path / "hub"), files_to_push(release)
    found = push(release, "me/model", items, True, quiet, hub)
    assert hub.made == [("me/model", True)]
    tensors = sorted(p.name for p in release.glob("*.safetensors"))
    assert len(tensors) > 2
    assert hub.commits[:-1] == [[name] for name in tensors]
    assert {"config.json", "README.md", "result.json", "provenance.json"} <= set(hub.commits[-1])
    pushed = {p.relative_to(hub.place).as_posix() for p in hub.place.rglob("*") if p.is_file()}
    assert pushed == {item.name for item in items} and ".DS_Store" not in pushed and "result.json.new" not in pushed
    assert all((hub.place / name).read_bytes() == (release / name).read_bytes() for name in pushed)
    assert found.url == "https://hub/me/model" and found.there == []


def test_a_push_that_was_stopped_goes_on(release: Path, tmp_path: Path) -> None:
    items = files_to_push(release)
    broken = Hub(tmp_path / "hub", fail_at=2)
    with pytest.raises(OutputError, match="the line is dead") as caught:
        push(release, "me/model", items, False, quiet, broken)
    assert "same command again" in str(caught.value)
    hub = Hub(tmp_path / "hub")
    found = push(release, "me/model", items, False, quiet, hub)
    assert [item.name for item in found.there] == [names[0] for names in broken.commits]
    assert {n for names in hub.commits for n in names}.isdisjoint(item.name for item in found.there)
    nothing = Hub(tmp_path / "hub")
    assert push(release, "me/model", items, False, quiet, nothing).sent == [] and nothing.commits == []
    (release / "README.md").write_text("# c4rd")  # as long as before
    push(release, "me/model", items, False, quiet, nothing)
    assert nothing.commits == [["README.md"]]


def test_what_is_not_finished_is_refused(release: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no result\.json"):
        files_to_push(tmp_path / "tiny")
    shard = sorted(release.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="no finished release") as caught:
        files_to_push(release)
    assert shard.name in str(caught.value) and f"{len(whole):,}" in str(caught.value)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="not what its run wrote"):
        files_to_push(release)
    shard.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        files_to_push(release)
    shard.write_bytes(whole)
    (release / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        files_to_push(release)


def test_the_hubs_refusals_are_told(release: Path, tmp_path: Path) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    items = files_to_push(release)
    with pytest.raises(OutputError, match="does not know who pushes"):
        push(release, "me/model", items, False, quiet, Hub(tmp_path / "hub", error=LocalTokenNotFoundError("no token")))
    denied = OSError("403")
    denied.response = SimpleNamespace(status_code=403)  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match="may not write"):
        push(release, "me/model", items, False, quiet, Hub(tmp_path / "hub", error=denied))
    for name in ("model", "me/model@main", "a b/c"):
        with pytest.raises(OutputError, match="no name of a repository"):
            push(release, name, items, False, quiet, Hub(tmp_path / "hub"))


def test_a_dry_run_asks_nobody(release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub

    def refused() -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "HfApi", refused)
    monkeypatch.setattr(sys, "argv", ["qwench", "push", str(release), "me/model", "--dry-run", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert stop.value.code == 0
    names = [item["name"] for item in json.loads(said.out)["sent"]]
    assert names == [item.name for item in files_to_push(release)]
    assert "qwench verify" in said.err


def test_what_a_careful_person_would_do_first(release: Path) -> None:
    assert [line.split("`")[1] for line in warnings(release)] == ["qwench eval", "qwench verify"]
    (release / "README.md").unlink()
    assert "qwench card" in warnings(release)[-1]
