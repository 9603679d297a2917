"""Headers of safetensors files: ours against the library's, and every way in which one can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from qwench.checkpoint.header import FileLayout, read_header
from qwench.checkpoint.source import BYTES_OF, DTYPE_CODE, TensorSpec
from qwench.errors import CheckpointError
from tests.support.files import bits, item, layouts, sample_tensors, write_raw


def refused(path: Path, *words: str) -> None:
    """Reading is refused with a message that names the file and these words, and says how to mend it."""
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    for word in (path.name, *words):
        assert word in caught.value.what
    assert caught.value.mend


def test_the_librarys_files_are_read_where_they_lie(tmp_path: Path) -> None:
    tensors, path = sample_tensors(), tmp_path / "a.safetensors"
    save_file(tensors, path)
    data = path.read_bytes()
    entries = {entry.name: entry for entry in read_header(path)}
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = entries[name]
        assert (entry.dtype, entry.shape, entry.file) == (DTYPE_CODE[tensor.dtype], tuple(tensor.shape), "a.safetensors")
        assert data[entry.start : entry.start + entry.nbytes] == bits(tensor)


def test_the_library_reads_our_headers(tmp_path: Path) -> None:
    [layout] = layouts({"a.safetensors": sample_tensors()})
    path = tmp_path / layout.name
    path.write_bytes(layout.header.ljust(layout.nbytes, b"\0"))
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        assert {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()} == {  # noqa: SIM118
            spec.name: spec.shape for spec in layout.tensors
        }


def test_reading_gives_back_what_was_laid_out(tmp_path: Path) -> None:
    [layout] = layouts({"a.safetensors": sample_tensors()})
    path = tmp_path / layout.name
    path.write_bytes(layout.header.ljust(layout.nbytes, b"\0"))
    assert sorted(read_header(path), key=lambda e: e.name) == sorted(layout.entries, key=lambda e: e.name)


def test_every_tensor_lies_at_a_multiple_of_its_element(tmp_path: Path) -> None:
    widths = [1, 8, 2, 4, 1, 2]
    codes = {1: "U8", 2: "BF16", 4: "F32", 8: "I64"}
    layout = FileLayout("a", tuple(TensorSpec(f"t{i}" * (i + 1), codes[w], (2 * i + 1,)) for i, w in enumerate(widths)))
    assert len(layout.header) % 8 == 0
    assert all(entry.start % BYTES_OF[entry.dtype] == 0 for entry in layout.entries)


def test_two_tensors_of_one_name_cannot_be_laid_out() -> None:
    with pytest.raises(AssertionError, match="two tensors"):
        _ = FileLayout("a", (TensorSpec("t", "U8", (1,)), TensorSpec("t", "U8", (2,)))).header


def test_truncated(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "cut.safetensors", {"t": item("F32", [50, 60], 0, 12_000)}, b"\0" * 7_000)
    size = path.stat().st_size
    refused(path, "truncated", f"needs {size + 5_000:,} bytes", f"the file is {size:,} bytes")


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    refused(write_raw(tmp_path / "a.safetensors", {}, length=5_000), "needs 5,008 bytes", "is 10 bytes")


def test_header_larger_than_the_format_allows(tmp_path: Path) -> None:
    refused(write_raw(tmp_path / "a.safetensors", {}, length=100_000_001), "100,000,001 bytes", "100,000,000")


def test_file_shorter_than_its_length_field(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"abc")
    refused(path, "3 bytes")


def test_pointer_of_git_lfs(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    refused(path, "Git LFS")


@pytest.mark.parametrize("text", [b"{'t': 1}", b"\xff\xfe{}", b'{"t": ', b"[" * 200_000])
def test_header_that_is_not_json(tmp_path: Path, text: bytes) -> None:
    refused(write_raw(tmp_path / "a.safetensors", text), "not JSON")


def test_header_that_is_no_table(tmp_path: Path) -> None:
    refused(write_raw(tmp_path / "a.safetensors", [1, 2]), "no table")


def test_tensor_named_twice_in_one_header(tmp_path: Path) -> None:
    line = json.dumps(item("U8", [2], 0, 2))
    refused(write_raw(tmp_path / "a.safetensors", f'{{"gate": {line}, "gate": {line}}}'.encode(), b"ab"), "gate", "twice")


def test_unknown_dtype(tmp_path: Path) -> None:
    refused(write_raw(tmp_path / "a.safetensors", {"gate": item("F7", [2], 0, 2)}, b"ab"), "gate", "unknown dtype 'F7'")


@pytest.mark.parametrize("bad", [7, {"dtype": "U8"}, item("U8", [-2], 0, 2), item("U8", [True], 0, 1), item("U8", [1.5], 0, 1)])
def test_line_without_a_dtype_or_a_shape(tmp_path: Path, bad: Any) -> None:
    refused(write_raw(tmp_path / "a.safetensors", {"gate": bad}, b"ab"), "gate")


@pytest.mark.parametrize("offsets", [None, [0], [0, 1, 2], [-1, 1], ["0", "2"]])
def test_line_without_offsets(tmp_path: Path, offsets: Any) -> None:
    bad = {"dtype": "U8", "shape": [2], "data_offsets": offsets}
    refused(write_raw(tmp_path / "a.safetensors", {"gate": bad}, b"ab"), "gate", "data_offsets")


@pytest.mark.parametrize("end", [22, 26, 0])
def test_shape_that_does_not_fill_its_range(tmp_path: Path, end: int) -> None:
    path = write_raw(tmp_path / "a.safetensors", {"gate": item("BF16", [3, 4], 0, end)}, b"\0" * end)
    refused(path, "gate", "BF16 of shape [3, 4] is 24 bytes", f"is {end}")


def test_gap(tmp_path: Path) -> None:
    table = {"up": item("U8", [3], 0, 3), "down": item("U8", [4], 5, 9)}
    refused(write_raw(tmp_path / "a.safetensors", table, b"\0" * 9), "a gap of 2 bytes between up and down")


def test_gap_at_the_beginning(tmp_path: Path) -> None:
    refused(
        write_raw(tmp_path / "a.safetensors", {"up": item("U8", [3], 4, 7)}, b"\0" * 7),
        "a gap of 4 bytes between the header and up",
    )


def test_overlap(tmp_path: Path) -> None:
    table = {"up": item("U8", [3], 0, 3), "down": item("U8", [4], 2, 6)}
    refused(write_raw(tmp_path / "a.safetensors", table, b"\0" * 6), "an overlap of 1 bytes between up and down")


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    refused(write_raw(tmp_path / "a.safetensors", {"up": item("U8", [3], 0, 3)}, b"\0" * 8), "5 bytes after its last tensor")


def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    refused(tmp_path / "a.safetensors", "cannot be read")
