"""Writing folders: what the library reads in them, their names and permissions, and everything that can go wrong on the way."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.staging import staging_of
from qwench.checkpoint.writer import CheckpointWriter
from qwench.errors import CheckpointError, OutputError
from tests.support.files import INDEX, bits, layouts, same_bits, sample_tensors, write_folder

SAMPLE = sample_tensors()
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FILES = {ONE: dict(list(SAMPLE.items())[:7]), TWO: dict(list(SAMPLE.items())[7:])}


def read_back(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as the safetensors library reads it."""
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def write_all(writer: CheckpointWriter) -> None:
    for name in reversed(SAMPLE):
        writer.write(name, SAMPLE[name])


def test_the_library_reads_what_we_write(out: Path) -> None:
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        write_all(writer)
        writer.commit()
    assert same_tensors(read_back(out), SAMPLE)
    for layout in layouts(FILES):
        assert (out / layout.name).stat().st_size == layout.nbytes


def test_the_index_is_the_published_kind(out: Path) -> None:
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        write_all(writer)
        writer.commit()
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in SAMPLE.values())}
    assert index["weight_map"] == {name: file for file, tensors in FILES.items() for name in tensors}


@pytest.mark.parametrize(("name", "indexed"), [("model.safetensors", False), ("visual_mtp.safetensors", True)])
def test_one_file_needs_an_index_only_under_another_name(out: Path, name: str, indexed: bool) -> None:
    with CheckpointWriter(out, layouts({name: SAMPLE}), "f") as writer:
        write_all(writer)
        writer.commit({"config.json": b"{}"})
    assert (out / INDEX).exists() == indexed
    assert Checkpoint.open(out).tensors.keys() == SAMPLE.keys()


def test_copies_are_bit_for_bit(out: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(write_folder(tmp_path / "source", FILES))
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        for name in SAMPLE:
            writer.copy(name, source, name)
        writer.commit()
    assert same_tensors(read_back(out), SAMPLE)


def test_parts_are_copied_under_new_names(out: Path, tmp_path: Path) -> None:
    stored = torch.arange(3 * 8 * 5, dtype=torch.int16).reshape(3, 8, 5)
    source = Checkpoint.open(write_folder(tmp_path / "source", {"model.safetensors": {"experts": stored}}))
    gates = {f"experts.{e}.gate": stored[e, :4].contiguous() for e in range(3)}
    with CheckpointWriter(out, layouts({"model.safetensors": gates}), "f") as writer:
        for e in range(3):
            writer.copy(f"experts.{e}.gate", source, "experts", (e, slice(0, 4)))
        writer.commit()
    assert same_tensors(read_back(out), gates)


def test_tensors_of_any_strides(out: Path) -> None:
    base = torch.arange(60, dtype=torch.int16).reshape(6, 10)
    views = {
        "t": base.t(),
        "column": base[:, 3],
        "corner": base[1:2, 4:5],
        "none": base[:0, 3],
        "wide": base[2:3, 1:9].expand(4, 8),
    }
    with CheckpointWriter(out, layouts({"model.safetensors": views}), "f") as writer:
        for name, view in views.items():
            writer.write(name, view)
        writer.commit()
    assert same_tensors(
        read_back(out), {name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}
    )


def test_tensors_larger_than_a_chunk(out: Path, tmp_path: Path) -> None:
    big = {"made": torch.randn(3, 700_001), "copied": torch.randn(1_500_001).bfloat16()}
    source = Checkpoint.open(write_folder(tmp_path / "source", {"model.safetensors": big}))
    with CheckpointWriter(out, layouts({"model.safetensors": big}), "f") as writer:
        writer.write("made", big["made"])
        writer.copy("copied", source, "copied")
        writer.commit()
    assert same_tensors(read_back(out), big)


def test_many_threads(out: Path) -> None:
    tensors = {f"t{i}": torch.full((i + 1, 40), i, dtype=torch.int32) for i in range(200)}
    halves = {ONE: dict(list(tensors.items())[::2]), TWO: dict(list(tensors.items())[1::2])}
    with CheckpointWriter(out, layouts(halves), "f") as writer:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda item: writer.write(*item), tensors.items()))
        assert writer.finished == {ONE, TWO}
        writer.commit()
    assert same_tensors(read_back(out), tensors)


def test_sidecars_ride_along(out: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"\x00\xff{}")
    (tmp_path / "tokenizer.json").symlink_to("blob")
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        write_all(writer)
        writer.commit({"config.json": b'{"a": 1}', "tokenizer.json": tmp_path / "tokenizer.json"})
    assert sorted(p.name for p in out.iterdir()) == sorted(["config.json", "tokenizer.json", INDEX, ONE, TWO])
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").read_bytes() == b"\x00\xff{}"
    assert (out / "config.json").read_bytes() == b'{"a": 1}'


def test_a_sidecar_that_vanished(out: Path, tmp_path: Path) -> None:
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        write_all(writer)
        with pytest.raises(CheckpointError, match=r"merges\.txt cannot be read"):
            writer.commit({"merges.txt": tmp_path / "merges.txt"})
        assert not out.exists()


def test_permissions_follow_the_umask(out: Path, umask: None) -> None:
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        write_all(writer)
        writer.commit({"config.json": b"{}"})
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o640}
    assert stat.S_IMODE(out.stat().st_mode) == 0o750


def test_the_folder_appears_at_the_end_and_alone(out: Path) -> None:
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        write_all(writer)
        assert not out.exists()
        assert [p.name for p in out.parent.iterdir()] == [".out.partial"]
        writer.commit()
        assert out.is_dir()
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(out: Path) -> None:
    out.mkdir()
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        write_all(writer)
        writer.commit()
    assert same_tensors(read_back(out), SAMPLE)


def test_a_name_that_was_taken_meanwhile(out: Path) -> None:
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        write_all(writer)
        out.mkdir()
        (out / "thesis.txt").write_text("x")
        with pytest.raises(OutputError, match="out cannot be written: Directory not empty"):
            writer.commit()
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        assert writer.done == SAMPLE.keys()
        writer.commit()
    assert same_tensors(read_back(out), SAMPLE)


def test_an_output_that_is_taken_is_refused_on_entering(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="is not empty"), CheckpointWriter(out, layouts(FILES), "f"):
        pass
    assert not staging_of(out).exists()


def test_a_disk_that_is_too_small_is_refused_on_entering(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = sum(layout.nbytes for layout in layouts(FILES))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=need + 99, f_frsize=1))
    with (
        pytest.raises(OutputError, match=f"needs {need + 100:,} bytes, {need + 99:,} are free"),
        CheckpointWriter(out, layouts(FILES), "f", 100),
    ):
        pass
    assert list(out.parent.iterdir()) == []


def test_two_runs_of_one_release(out: Path) -> None:
    with (
        CheckpointWriter(out, layouts(FILES), "f") as writer,
        pytest.raises(OutputError, match=f"another run .process {os.getpid()}."),
        CheckpointWriter(out, layouts(FILES), "f"),
    ):
        pass
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        write_all(writer)
        writer.commit()


def test_what_does_not_fit_the_plan_is_our_fault(out: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(write_folder(tmp_path / "source", FILES))
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        with pytest.raises(AssertionError, match="f32 is planned as F32"):
            writer.write("f32", SAMPLE["f32"].half())
        with pytest.raises(AssertionError, match=r"f32 is planned as \[7, 2\]"):
            writer.write("f32", SAMPLE["f32"].t())
        with pytest.raises(AssertionError, match="f32 is planned as F32"):
            writer.copy("f32", source, "f64")
        with pytest.raises(AssertionError, match=r"f32 is planned as \[7, 2\]"):
            writer.copy("f32", source, "f32", (slice(0, 3),))
        with pytest.raises(AssertionError, match="were never written"):
            writer.commit()
    assert not out.exists()


def test_bytes_are_put_as_they_come(out: Path) -> None:
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        for name, tensor in SAMPLE.items():
            data = memoryview(bits(tensor))
            writer.put(name, (data[i : i + 7] for i in range(0, len(data), 7)))
        writer.commit()
    assert same_tensors(read_back(out), SAMPLE)


@pytest.mark.parametrize("length", [55, 57])
def test_too_few_or_too_many_bytes_are_our_fault(out: Path, length: int) -> None:
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        before = (staging_of(out) / "files" / ONE).read_bytes()
        with pytest.raises(AssertionError, match="f32: "):
            writer.put("f32", iter([memoryview(b"\xff" * length)]))
        assert "f32" not in writer.done
        changed = [
            i for i, (a, b) in enumerate(zip(before, (staging_of(out) / "files" / ONE).read_bytes(), strict=True)) if a != b
        ]
        assert len(changed) <= 55  # never a byte of the tensor behind it


@pytest.mark.parametrize("files", [{ONE: SAMPLE, TWO: {"f32": SAMPLE["f32"]}}])
def test_a_tensor_planned_twice_is_our_fault(out: Path, files: dict[str, dict[str, Tensor]]) -> None:
    with pytest.raises(AssertionError, match="planned twice"):
        CheckpointWriter(out, layouts(files), "f")


def full_after(monkeypatch: pytest.MonkeyPatch, allowed: int, code: int = errno.ENOSPC) -> None:
    """A disk that takes so many more bytes, in pieces smaller than asked for, and then fails."""
    pwrite, left = os.pwrite, [allowed]

    def limited(descriptor: int, data: memoryview, offset: int) -> int:
        if left[0] <= 0:
            raise OSError(code, os.strerror(code))
        moved = pwrite(descriptor, data[: min(100, left[0])], offset)
        left[0] -= moved
        return moved

    monkeypatch.setattr(os, "pwrite", limited)


def test_a_disk_that_fills_up(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": torch.full((i + 3, 50), i, dtype=torch.uint8) for i in range(10)}  # 150, 200, 250 ... bytes
    [layout] = layouts({"model.safetensors": tensors})
    with monkeypatch.context() as patch:
        full_after(patch, len(layout.header) + 150 + 200 + 101)
        with pytest.raises(OutputError) as caught, CheckpointWriter(out, [layout], "f") as writer:
            patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=7, f_frsize=100))
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.commit()
    missing = sum(t.nbytes for t in tensors.values()) - 350
    assert (
        f"model.safetensors does not fit, 700 bytes are free, {missing:,} are still to be written, {missing - 700:,} too many"
        in caught.value.what
    )
    assert "what is written is kept" in caught.value.mend
    assert not out.exists()
    with CheckpointWriter(out, [layout], "f") as writer:
        assert writer.done == {"t0", "t1"}
        assert writer.notes == ["resumed: 2 of 10 tensors and 0 of 1 files are kept"]
        for name in tensors.keys() - writer.done:
            writer.write(name, tensors[name])
        writer.commit()
    assert same_tensors(read_back(out), tensors)


def test_a_disk_that_fails(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        full_after(monkeypatch, 0, errno.EIO)
        with pytest.raises(OutputError, match=f"{ONE} cannot be written: Input/output error"):
            writer.write("f32", SAMPLE["f32"])
        assert "f32" not in writer.done


def test_a_disk_that_fills_up_with_the_last_small_file(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if b"config.json" in os.readlink(f"/proc/self/fd/{descriptor}").encode():  # noqa: PTH115
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with CheckpointWriter(out, layouts(FILES), "f") as writer:
        write_all(writer)
        with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"config\.json does not fit"):
            patch.setattr(os, "fsync", full)
            writer.commit({"config.json": b"{}"})
        assert not out.exists()
        writer.commit({"config.json": b"{}"})
    assert Checkpoint.open(out).tensors.keys() == SAMPLE.keys()
