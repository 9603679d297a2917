"""A release of whole files: it appears at once, and what a stopped run finished is kept exactly where its bytes are still those."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import pytest

from qwench.checkpoint.whole_files import WholeFiles, crc_of
from qwench.errors import OutputError

CONTENT = {"a.bin": bytes(range(200)) * 41, "b.bin": b"second" * 317}
SIZES: dict[str, int | None] = {name: len(data) for name, data in CONTENT.items()}


def put(files: WholeFiles, name: str) -> None:
    files.path(name).write_bytes(CONTENT[name])
    files.finished(name, zlib.crc32(CONTENT[name]))


def test_nothing_appears_before_the_commit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with WholeFiles(out, SIZES, "one") as files:
        for name in files.left:
            put(files, name)
        assert not out.exists()
        files.commit({"config.json": b"{}"})
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {**CONTENT, "config.json": b"{}"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_stopped_run_keeps_what_was_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), WholeFiles(tmp_path / "out", SIZES, "one") as files:
        put(files, "a.bin")
        files.remark("learnt", {"on": "the way"})
        files.path("b.bin").write_bytes(b"half")
        raise KeyboardInterrupt
    with WholeFiles(tmp_path / "out", SIZES, "one") as files:
        assert files.left == ["b.bin"] and files.remarks == {"learnt": {"on": "the way"}}
        assert files.notes == ["resumed: 1 of 2 files are kept"]
        assert not files.path("b.bin").exists(), "half a file is not kept"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [b"x" + CONTENT["a.bin"][1:], CONTENT["a.bin"][:-1]])
def test_a_file_that_changed_is_written_again(damage: bytes, tmp_path: Path) -> None:
    with WholeFiles(tmp_path / "out", SIZES, "one") as files:
        put(files, "a.bin")
        files.path("a.bin").write_bytes(damage)
    with WholeFiles(tmp_path / "out", SIZES, "one") as files:
        assert files.left == ["a.bin", "b.bin"]
        assert files.notes == ["a.bin changed since they were written, and are written again"]


def test_another_run_starts_clean(tmp_path: Path) -> None:
    with WholeFiles(tmp_path / "out", SIZES, "one") as files:
        put(files, "a.bin")
    with WholeFiles(tmp_path / "out", SIZES, "two") as files:
        assert files.left == list(SIZES) and "deleted, starting clean" in files.notes[0]


def test_kill(tmp_path: Path) -> None:
    """`kill -9` in the middle of the second file."""
    code = f"""
    import os, signal, zlib
    from pathlib import Path
    from qwench.checkpoint.whole_files import WholeFiles
    content = {CONTENT!r}
    with WholeFiles(Path({str(tmp_path / "out")!r}), {SIZES!r}, "one") as files:
        files.path("a.bin").write_bytes(content["a.bin"])
        files.finished("a.bin", zlib.crc32(content["a.bin"]))
        files.path("b.bin").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert ended.returncode == -9 and not (tmp_path / "out").exists()
    with WholeFiles(tmp_path / "out", SIZES, "one") as files:
        assert files.left == ["b.bin"]
        put(files, "b.bin")
        files.commit({})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(CONTENT)


def test_too_large_for_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the disk of .* is too small: out needs 1,000,000,000,000,000,0"):
        WholeFiles(tmp_path / "out", {"a": 10**18}, "one", others=5).__enter__()
    assert not list(tmp_path.iterdir())


def test_check_sum(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT["a.bin"])
    assert crc_of(tmp_path / "x") == zlib.crc32(CONTENT["a.bin"])
