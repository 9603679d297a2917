"""Where a release may go, and who may work on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwench.checkpoint import staging
from qwench.checkpoint.staging import Staging, check_output, staging_of
from qwench.errors import OutputError


def refusal(action: Callable[[], object]) -> str:
    """What an OutputError says, which also says how to mend it."""
    with pytest.raises(OutputError) as caught:
        action()
    assert caught.value.mend
    return caught.value.what


def test_free_places(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "new", 1000)
    check_output(tmp_path / "empty", 1000)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    assert refusal(lambda: check_output(tmp_path / "out", 1)) == f"the output {tmp_path / 'out'} is a file"


def test_output_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    assert refusal(lambda: check_output(tmp_path / "out", 1)) == f"the output folder {tmp_path / 'out'} is not empty"
    assert (tmp_path / "out" / "thesis.txt").read_text() == "x"


def test_missing_parent(tmp_path: Path) -> None:
    assert f"the folder {tmp_path / 'a'} does not exist" in refusal(lambda: check_output(tmp_path / "a" / "out", 1))


def test_parent_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (mode & os.W_OK)
    )  # the tests may run as root, who may write anywhere
    assert refusal(lambda: check_output(tmp_path / "out", 1)) == f"the folder {tmp_path} is not writable"


def test_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=10, f_frsize=4096))
    check_output(tmp_path / "out", 40_960)
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / "out", 42_000)
    assert "out needs 42,000 bytes, 40,960 are free" in caught.value.what
    assert "free 1,040 bytes" in caught.value.mend


def test_what_an_unfinished_run_left_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = staging_of(tmp_path / "out") / "files"
    files.mkdir(parents=True)
    (files / "a").write_bytes(os.urandom(8192))
    os.sync()
    allocated = (files / "a").stat().st_blocks * 512
    assert allocated >= 8192
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=4096))
    check_output(tmp_path / "out", 4096 + allocated)
    assert "too small" in refusal(lambda: check_output(tmp_path / "out", 4096 + allocated + 1))


def test_one_run_at_a_time(tmp_path: Path) -> None:
    first = Staging(tmp_path / "out")
    what = refusal(lambda: Staging(tmp_path / "out"))
    assert what == f"another run (process {os.getpid()}) is writing {tmp_path / 'out'}"
    other = Staging(tmp_path / "other")
    first.release()
    other.release()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    staging_of(tmp_path / "out").mkdir()
    (staging_of(tmp_path / "out") / "lock").write_text("999999999\n")
    taken = Staging(tmp_path / "out")
    assert (taken.folder / "lock").read_text() == f"{os.getpid()}\n"
    taken.release()


def test_a_lock_that_was_removed_while_we_took_it_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, lock = staging.fcntl.flock, staging_of(tmp_path / "out") / "lock"
    calls = []

    def flock_after_removal(descriptor: int, mode: int) -> None:
        flock(descriptor, mode)
        calls.append(mode)
        if len(calls) == 1:
            lock.unlink()

    monkeypatch.setattr(staging.fcntl, "flock", flock_after_removal)
    taken = Staging(tmp_path / "out")
    assert len(calls) == 2
    assert "another run" in refusal(lambda: Staging(tmp_path / "out"))
    taken.release()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    folder = staging_of(tmp_path / "out")
    folder.mkdir()
    (folder / "thesis.txt").write_text("x")
    assert "holds thesis.txt, which is not ours" in refusal(lambda: Staging(tmp_path / "out"))
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


def test_names_with_dots_and_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert staging_of(tmp_path / "link") == tmp_path / ".real.partial"
    assert staging_of(tmp_path / "a" / ".." / "b.v1") == tmp_path / ".b.v1.partial"
