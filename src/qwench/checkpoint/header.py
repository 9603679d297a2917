"""The header of a safetensors file: reading and writing stand side by side.

A file is three things in a row:

    8 bytes    N, the length of the header: little endian, unsigned
    N bytes    JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {"format": "pt"}}
    the rest   the tensors, back to back; offsets count from the end of the header

The format (https://github.com/huggingface/safetensors) allows neither gaps nor overlaps between tensors nor bytes after the last one, and at most
100 MB of header. We hold every file to all of it before a single tensor is read, so that a damaged download is found in a second and not in an hour.

Writing orders the tensors by the width of their elements, widest first, and pads the header with spaces to 8 bytes: every tensor then begins
at a multiple of its element's width, which readers that map files into memory need.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from qwench.checkpoint.source import BYTES_OF, TensorEntry, TensorSpec
from qwench.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Bytes of header that the format allows."""

FETCH = "fetch the file again, or ask whoever made it"


@dataclass(frozen=True)
class FileLayout:
    """A safetensors file that is to be written: everything but the numbers.

    Attributes:
        name: its name in the folder.
        tensors: what it holds; their order is kept among elements of one width.
    """

    name: str
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def header(self) -> bytes:
        """The first bytes of the file, up to the first tensor."""
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for spec, offset in self._placed:
            table[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
        assert len(table) == len(self.tensors) + 1, f"{self.name}: two tensors of one name"
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        assert len(text) <= MAX_HEADER, f"{self.name}: header of {len(text)} bytes"
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Where each tensor will lie, in the order of the file."""
        base = len(self.header)
        return tuple(TensorEntry(s.name, s.dtype, s.shape, self.name, base + offset) for s, offset in self._placed)

    @cached_property
    def nbytes(self) -> int:
        """The exact size of the file."""
        return len(self.header) + sum(s.nbytes for s in self.tensors)

    @cached_property
    def _placed(self) -> list[tuple[TensorSpec, int]]:
        """Tensors in file order, with their offsets behind the header."""
        placed, offset = [], 0
        for spec in sorted(self.tensors, key=lambda s: -BYTES_OF[s.dtype]):
            placed.append((spec, offset))
            offset += spec.nbytes
        return placed


def read_header(path: Path) -> tuple[TensorEntry, ...]:
    """The tensors of a file, in the order in which they lie. Raises CheckpointError for a file that is not whole and sound."""
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            length = _header_length(path, handle.read(8), size)
            text = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "make the file readable, or fetch it again") from None
    table = _parse(path, text)
    base = 8 + length
    entries = sorted((_entry(path, name, item, base) for name, item in table.items()), key=lambda e: (e.start, e.nbytes))
    _check_packed(path, entries, base, size)
    return tuple(entries)


def _header_length(path: Path, first: bytes, size: int) -> int:
    if first == b"version ":  # how a pointer of Git LFS begins
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the tensors", "run `git lfs pull` in that folder")
    if len(first) < 8:
        raise CheckpointError(f"{path} is no safetensors file: it has {size:,} bytes, and the format begins with 8", FETCH)
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: a header of {length:,} bytes, the format allows {MAX_HEADER:,}", f"it is no safetensors file: {FETCH}"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path} is truncated: its header alone needs {8 + length:,} bytes, the file is {size:,} bytes", FETCH
        )
    return length


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """The header's table without its metadata."""

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise CheckpointError(f"{path}: the header names {', '.join(twice)} twice", FETCH)
        return table

    try:
        table = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}", FETCH) from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: the header is JSON, but no table of tensors", FETCH)
    table.pop("__metadata__", None)
    return table


def _entry(path: Path, name: str, item: Any, base: int) -> TensorEntry:
    """One line of the table, checked on its own."""
    where = f"{path}, tensor {name}"
    dtype, shape, offsets = (
        (item.get(k) for k in ("dtype", "shape", "data_offsets")) if isinstance(item, dict) else (None, None, None)
    )
    if not isinstance(dtype, str) or dtype not in BYTES_OF:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}", f"known: {', '.join(BYTES_OF)}")
    if not _counts(shape):
        raise CheckpointError(f"{where}: {shape!r} is no shape", FETCH)
    if not _counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: {offsets!r} are no data_offsets", FETCH)
    begin, end = offsets
    entry = TensorEntry(name, dtype, tuple(shape), path.name, base + begin)
    if end - begin != entry.nbytes:
        what = f"{where}: {dtype} of shape {shape} is {math.prod(shape) * BYTES_OF[dtype]:,} bytes, its range {begin:,}..{end:,} is {end - begin:,}"
        raise CheckpointError(what, FETCH)
    return entry


def _counts(value: Any) -> TypeGuard[list[int]]:
    """A list of numbers that count something: whole, not negative (JSON's `true` is no number here)."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_packed(path: Path, entries: Sequence[TensorEntry], base: int, size: int) -> None:
    """Tensors lie back to back from the header to the end of the file."""
    reached, before = base, "the header"
    for entry in entries:
        if entry.start != reached:
            fault = "a gap" if entry.start > reached else "an overlap"
            what = f"{path}: {fault} of {abs(entry.start - reached):,} bytes between {before} and {entry.name}"
            raise CheckpointError(what, FETCH)
        reached, before = entry.start + entry.nbytes, entry.name
    if size < reached:
        raise CheckpointError(f"{path} is truncated: it needs {reached:,} bytes, the file is {size:,} bytes", FETCH)
    if size > reached:
        raise CheckpointError(
            f"{path} has {size - reached:,} bytes after its last tensor: it needs {reached:,}, the file is {size:,} bytes",
            FETCH,
        )
