"""Reading tensors, parts and raw bytes; how much is moved for it; what happens when the file changes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import BYTES_OF, DTYPE_CODE, TORCH_DTYPE, Part, TensorSource
from qwench.errors import CheckpointError
from tests.support.files import bits, same_bits, sample_tensors, write_folder

SAMPLE = sample_tensors()
MIDDLE = len(SAMPLE) // 2
EXPERTS = torch.arange(5 * 14 * 6, dtype=torch.int32).reshape(5, 14, 6)
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    items = list(SAMPLE.items())
    return write_folder(tmp_path / "m", {ONE: dict(items[:MIDDLE]), TWO: dict(items[MIDDLE:]) | {"experts": EXPERTS}})


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read."""
    sizes: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        sizes.append(preadv(descriptor, buffers, offset))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return sizes


def test_every_dtype_is_read_as_the_library_reads_it(folder: Path) -> None:
    source: TensorSource = Checkpoint.open(folder)
    library = load_file(folder / ONE) | load_file(folder / TWO)
    assert library.keys() == source.tensors.keys()
    for name, tensor in library.items():
        assert same_bits(source.read(name), tensor), name


def test_the_tables_of_dtypes_agree() -> None:
    assert {code: dtype.itemsize for code, dtype in TORCH_DTYPE.items()} == BYTES_OF
    assert {TORCH_DTYPE[code] for code in BYTES_OF} == set(DTYPE_CODE)
    assert {tensor.dtype for tensor in SAMPLE.values()} == set(DTYPE_CODE)


def test_counts_of_dtypes(folder: Path) -> None:
    counts = Checkpoint.open(folder).dtypes()
    assert counts["F16"] == 1
    assert counts["F32"] == 3  # f32, scalar, empty
    assert sum(counts.values()) == len(SAMPLE) + 1


def test_files_and_config(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.files == {ONE: (folder / ONE).stat().st_size, TWO: (folder / TWO).stat().st_size}
    assert checkpoint.config == {"model_type": "qwen3_5"}
    assert checkpoint.folder == folder


PARTS: list[Part] = [
    (3,),
    (3, slice(0, 7)),
    (slice(1, 4), slice(7, 14)),
    (slice(None), slice(2, 9), slice(1, 3)),
    (2, 13, 5),
    (slice(2, 2),),
]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_moves_its_own_bytes_and_no_others(folder: Path, moved: list[int], part: Part) -> None:
    got = Checkpoint.open(folder).read("experts", part)
    assert same_bits(got, EXPERTS[part])
    assert sum(moved) == got.nbytes


def test_opening_reads_no_tensor(folder: Path, moved: list[int]) -> None:
    Checkpoint.open(folder)
    assert moved == []


def test_what_is_read_can_be_written_to(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.read("experts").zero_()
    assert torch.equal(checkpoint.read("experts"), EXPERTS)


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("part", [(), (3,), (slice(1, 4), slice(7, 14))])
def test_chunks_are_the_stored_bytes(folder: Path, size: int, part: Part) -> None:
    chunks = [bytes(chunk) for chunk in Checkpoint.open(folder).chunks("experts", part, size)]
    assert b"".join(chunks) == bits(EXPERTS[part])
    assert all(len(chunk) == size for chunk in chunks[:-1])


def test_chunks_of_nothing(folder: Path) -> None:
    assert list(Checkpoint.open(folder).chunks("empty")) == []


def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:11]], offset))
    assert torch.equal(Checkpoint.open(folder).read("experts"), EXPERTS)


def test_many_threads(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    names = [name for name in SAMPLE for _ in range(20)]
    with ThreadPoolExecutor(8) as pool:
        assert all(
            same_bits(tensor, SAMPLE[name]) for name, tensor in zip(names, pool.map(checkpoint.read, names), strict=True)
        )


def test_unknown_tensor(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tensor mtp\.fc\.weight"):
        Checkpoint.open(folder).read("mtp.fc.weight")


def test_file_cut_off_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    name, entry = next((n, e) for n, e in checkpoint.tensors.items() if n == "experts")
    os.truncate(folder / entry.file, entry.start + 100)
    with pytest.raises(CheckpointError, match=f"{entry.file} ends at byte {entry.start + 100:,}, inside of tensor {name}"):
        checkpoint.read(name)


def test_disk_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"tensor experts: Input/output error"):
        Checkpoint.open(folder).read("experts")


def test_closing_gives_the_files_back(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.read("f32")
        checkpoint.read("experts")
        assert len(os.listdir("/proc/self/fd")) == before + 2  # noqa: PTH208
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_the_stamp_tells_a_changed_checkpoint(folder: Path) -> None:
    stamp = Checkpoint.open(folder).stamp()
    assert Checkpoint.open(folder).stamp() == stamp
    os.utime(folder / TWO, ns=(1, 1))
    assert Checkpoint.open(folder).stamp() != stamp
