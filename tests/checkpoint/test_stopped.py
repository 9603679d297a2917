"""Runs that are stopped and started again: the second run ends with the bytes of one that was never stopped, or starts clean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwench.checkpoint.staging import staging_of
from qwench.checkpoint.writer import CheckpointWriter
from tests.support.files import layouts

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NAMES = [f"layer.{i}" for i in range(8)]
SIDECARS = {"config.json": b"{}", "tokenizer.json": b"[1, 2]"}


def tensors(seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(200 + i, 17, generator=generator) for i, name in enumerate(NAMES)}


def files(seed: int = 3) -> dict[str, dict[str, Tensor]]:
    all_of_them = tensors(seed)
    return {ONE: {n: all_of_them[n] for n in NAMES[:5]}, TWO: {n: all_of_them[n] for n in NAMES[5:]}}


def run(out: Path, stop_after: int | None = None, fingerprint: str = "f", seed: int = 3) -> CheckpointWriter:
    """One run, in order, that skips what is done; `stop_after` that many tensors somebody presses Ctrl-C."""
    with CheckpointWriter(out, layouts(files(seed)), fingerprint) as writer:
        todo = [name for name in NAMES if name not in writer.done]
        for count, name in enumerate(todo):
            if count == stop_after:
                signal.raise_signal(signal.SIGINT)
            writer.remark(name, {"seed": seed})
            writer.write(name, tensors(seed)[name])
        writer.commit(SIDECARS)
    return writer


def contents(folder: Path) -> Mapping[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """What a run that nobody stops writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(out)
    return contents(out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def stop(out: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(out, stop_after=after)


@pytest.mark.parametrize("after", [0, 3, 6])
def test_ctrl_c_keeps_what_is_written(out: Path, whole: Mapping[str, bytes], after: int) -> None:
    stop(out, after)
    assert not out.exists()
    assert sorted(p.name for p in staging_of(out).iterdir()) == ["files", "journal.jsonl"]
    writer = run(out)
    assert contents(out) == whole
    assert list(out.parent.iterdir()) == [out]
    kept = f"resumed: {after} of 8 tensors and {int(after >= 5)} of 2 files are kept"
    assert writer.notes == ([kept] if after else [])


def test_finished_files_are_known_before_the_first_write(out: Path) -> None:
    stop(out, 6)
    with CheckpointWriter(out, layouts(files()), "f") as writer:
        assert writer.done == set(NAMES[:6])
        assert writer.finished == {ONE}


def test_remarks_outlive_a_run(out: Path) -> None:
    stop(out, 2)
    stop(out, 3)
    with CheckpointWriter(out, layouts(files()), "f") as writer:
        assert writer.remarks == {name: {"seed": 3} for name in NAMES[:5]}
    assert run(out).remarks == {name: {"seed": 3} for name in NAMES}


def test_remarks_of_another_recipe_are_forgotten(out: Path) -> None:
    stop(out, 4)
    with CheckpointWriter(out, layouts(files()), "g") as writer:
        assert writer.remarks == {}


KILLED = """
import os, signal, sys
from pathlib import Path
from qwench.checkpoint.writer import CheckpointWriter
from tests.checkpoint.test_stopped import NAMES, SIDECARS, files, layouts, tensors

where, out = sys.argv[1], Path(sys.argv[2])
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
pwrite = os.pwrite

def half_of_it(descriptor, data, offset):
    pwrite(descriptor, data[: len(data) // 2], offset)
    die()

with CheckpointWriter(out, layouts(files()), "f") as writer:
    for name in NAMES:
        if where == "in a tensor" and name == NAMES[6]:
            os.pwrite = half_of_it
        if where == "between tensors" and name == NAMES[2]:
            die()
        writer.write(name, tensors()[name])
    if where == "before the rename":
        Path.rename = die
    writer.commit(SIDECARS)
"""


@pytest.mark.parametrize(("where", "kept"), [("between tensors", 2), ("in a tensor", 6), ("before the rename", 8)])
def test_kill_9(out: Path, whole: Mapping[str, bytes], where: str, kept: int) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(out)], env=environment, cwd=root, capture_output=True, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not out.exists()
    assert (staging_of(out) / "lock").exists()  # nobody was left to remove it
    writer = run(out)
    assert len([note for note in writer.notes if note.startswith(f"resumed: {kept} of 8 tensors")]) == 1
    assert contents(out) == whole
    assert list(out.parent.iterdir()) == [out]


def test_another_recipe_starts_clean(out: Path, whole: Mapping[str, bytes]) -> None:
    stop(out, 6)
    writer = run(out, fingerprint="g")
    assert writer.notes == [".out.partial is of an unfinished run with another source or recipe: deleted, starting clean"]
    assert contents(out) == whole


def test_another_layout_starts_clean(out: Path) -> None:
    stop(out, 6)
    with CheckpointWriter(out, layouts({"model.safetensors": tensors()}), "f") as writer:
        assert writer.done == set()
        assert sorted(p.name for p in (staging_of(out) / "files").iterdir()) == ["model.safetensors"]


def test_a_truncated_file_is_written_again(out: Path, whole: Mapping[str, bytes]) -> None:
    stop(out, 7)
    os.truncate(staging_of(out) / "files" / ONE, 30_000)
    writer = run(out)
    [resumed, changed] = writer.notes
    assert resumed == "resumed: 4 of 8 tensors and 0 of 2 files are kept"
    assert changed == f"{ONE}: 3 tensors changed since they were written, and are written again"
    assert contents(out) == whole


def test_a_replaced_file_is_written_again(out: Path, whole: Mapping[str, bytes]) -> None:
    stop(out, 7)
    path = staging_of(out) / "files" / TWO
    path.write_bytes(os.urandom(path.stat().st_size))
    writer = run(out)
    assert writer.notes[1] == f"{TWO}: 2 tensors changed since they were written, and are written again"
    assert contents(out) == whole


def test_one_flipped_bit_is_noticed(out: Path, whole: Mapping[str, bytes]) -> None:
    stop(out, 7)
    path = staging_of(out) / "files" / ONE
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    writer = run(out)
    assert writer.notes[1] == f"{ONE}: 1 tensors changed since they were written, and are written again"
    assert contents(out) == whole


def test_a_missing_file_is_written_again(out: Path, whole: Mapping[str, bytes]) -> None:
    stop(out, 7)
    (staging_of(out) / "files" / ONE).unlink()
    run(out)
    assert contents(out) == whole


def test_a_torn_journal_is_believed_as_far_as_it_goes(out: Path, whole: Mapping[str, bytes]) -> None:
    stop(out, 6)
    journal = staging_of(out) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    writer = run(out)
    assert writer.notes == ["resumed: 5 of 8 tensors and 1 of 2 files are kept"]
    assert contents(out) == whole


def test_a_lost_journal_starts_clean(out: Path, whole: Mapping[str, bytes]) -> None:
    stop(out, 6)
    (staging_of(out) / "journal.jsonl").unlink()
    writer = run(out)
    assert "starting clean" in writer.notes[0]
    assert contents(out) == whole


def test_sidecars_of_a_run_that_died_among_them_do_not_stay(out: Path, whole: Mapping[str, bytes]) -> None:
    stop(out, 7)
    (staging_of(out) / "files" / "old.json").write_text("{")
    run(out)
    assert contents(out) == whole


def test_stopped_twice(out: Path, whole: Mapping[str, bytes]) -> None:
    stop(out, 2)
    stop(out, 3)
    assert run(out).notes == ["resumed: 5 of 8 tensors and 1 of 2 files are kept"]
    assert contents(out) == whole


def test_writing_again_what_is_done_changes_nothing(out: Path, whole: Mapping[str, bytes]) -> None:
    stop(out, 6)
    with CheckpointWriter(out, layouts(files()), "f") as writer:
        for name in NAMES:
            writer.write(name, tensors()[name])
        writer.commit(SIDECARS)
    assert contents(out) == whole
