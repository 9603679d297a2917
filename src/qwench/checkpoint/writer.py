"""Writing a checkpoint folder that appears whole or not at all.

The plan knows every tensor of every file before the first is computed. So each file gets its full size and its header at once, and tensors stream into their
places in any order, from any thread; memory follows the largest tensor. All of it grows in a hidden folder (see `staging`), and each finished
tensor goes down in a journal (see `journal`). What is stopped, by Ctrl-C, a full disk or `kill -9`, goes on where it was as long as it is the same release;
`commit` is the only thing that gives the folder its name, and no error leads there.

    with CheckpointWriter(out, plan.files, fingerprint) as writer:
        for block in blocks:
            if not names_of(block) <= writer.done:
                writer.write(name, tensor)                  # computed
                writer.copy(name, source, name)             # bit for bit
        writer.commit({"config.json": text, **sidecars_of(source.folder)})
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.folder import INDEX_NAME
from qwench.checkpoint.header import FileLayout
from qwench.checkpoint.journal import Journal, read_journal
from qwench.checkpoint.parts import part_shape
from qwench.checkpoint.reader import CHUNK
from qwench.checkpoint.sidecars import content_of, put_file
from qwench.checkpoint.source import DTYPE_CODE, Part, StoredSource, TensorEntry
from qwench.checkpoint.staging import Seal, Staging, check_output, output_errors

__all__ = ["CheckpointWriter", "FileLayout"]

SINGLE = "model.safetensors"
"""The one file name that readers find without an index."""


class CheckpointWriter:
    """A release in the making. Use it in a `with`: entering takes the staging folder, leaving lets go of it and keeps what is unfinished.

    Args:
        out: the folder that is to appear; it may exist if it is empty.
        files: what goes where.
        fingerprint: of all that the bytes follow from (source, recipe, version). An unfinished run with the same one is continued, another one is deleted.
        others: bytes that the other files of the release will take about, for the check of free space.

    Attributes:
        done: tensors that are written; after entering, those that an earlier run wrote.
        notes: what became of an earlier run; one sentence each.
        remarks: what was put down with `remark`, by an earlier run too.

    Raises:
        OutputError: on entering, where nothing can be written (see `staging.check_output`); later where the disk is full or fails.
    """

    def __init__(self, out: Path, files: Sequence[FileLayout], fingerprint: str, others: int = 0) -> None:
        self.out, self.files, self.others = out, tuple(files), others
        self.done: set[str] = set()
        self.notes: list[str] = []
        self.remarks: dict[str, dict[str, Any]] = {}
        self._entries = {entry.name: entry for layout in self.files for entry in layout.entries}
        assert len(self._entries) == sum(len(layout.tensors) for layout in self.files), "a tensor is planned twice"
        assert len({layout.name for layout in self.files}) == len(self.files), "a file is planned twice"
        self._fingerprint = _whole_fingerprint(fingerprint, self.files)
        self._open = ExitStack()
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._pending = {layout.name: len(layout.tensors) for layout in self.files}
        self._missing = sum(entry.nbytes for entry in self._entries.values())

    @property
    def finished(self) -> set[str]:
        """Files of which every tensor is written."""
        return {name for name, count in self._pending.items() if count == 0}

    @property
    def staged(self) -> Path:
        """The folder that the files grow in, before it gets its name."""
        return self._staging.files

    @property
    def scratch(self) -> Path:
        """A folder beside the unfinished files for what a run must remember besides; it is kept with them, and goes with the commit."""
        return self._staging.walk

    def __enter__(self) -> CheckpointWriter:
        check_output(self.out, sum(layout.nbytes for layout in self.files) + self.others)
        with ExitStack() as stack:
            self._staging = Staging(self.out)
            stack.callback(self._staging.release)
            kept = self._claims()
            with output_errors(self._staging.files, self._missing):
                self._lay_out(stack)
                kept = self._proved(kept)
                self._journal = Journal(self._staging.journal, self._fingerprint, kept, self.remarks)
            stack.callback(self._journal.close)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor [any shape] in its place; it has the planned dtype and shape, on any device."""
        entry = self._entries[name]
        assert DTYPE_CODE[tensor.dtype] == entry.dtype, f"{name} is planned as {entry.dtype}, not {tensor.dtype}"
        assert tuple(tensor.shape) == entry.shape, f"{name} is planned as {list(entry.shape)}, not {list(tensor.shape)}"
        data = _bytes_of(tensor)
        self._put(entry, (data[i : i + CHUNK] for i in range(0, len(data), CHUNK)))

    def copy(self, name: str, source: StoredSource, tensor: str, part: Part = ()) -> None:
        """Put a stored tensor, or a part of one, in its place bit for bit, whatever its bytes mean. Raises CheckpointError as `chunks` does."""
        entry, stored = self._entries[name], source.tensors[tensor]
        assert stored.dtype == entry.dtype, f"{name} is planned as {entry.dtype}, {tensor} is {stored.dtype}"
        assert part_shape(stored.shape, part) == entry.shape, (
            f"{name} is planned as {list(entry.shape)}, not as {tensor} at {part}"
        )
        self._put(entry, source.chunks(tensor, part))

    def put(self, name: str, chunks: Iterable[memoryview]) -> None:
        """Put the bytes of a tensor in their place as they come, whatever they mean."""
        self._put(self._entries[name], chunks)

    def remark(self, key: str, data: dict[str, Any]) -> None:
        """Keep something that belongs to the tensors of `key` (plain data) for the record, across runs; put it down before the tensors."""
        with output_errors(self._staging.journal, self._missing):
            self._journal.remark(key, data)
        with self._lock:
            self.remarks[key] = data

    def commit(self, sidecars: Mapping[str, bytes | Path] | None = None, seal: Seal | None = None) -> None:
        """Add the other files and the index, bring everything to the disk, and let the folder appear.

        Args:
            sidecars: file name -> content, or a file to copy.
            seal: makes files of what lies in the folder when all else is in place: sums over it.
        """
        lacking = self._entries.keys() - self.done
        assert not lacking, f"{len(lacking)} tensors were never written, such as {min(lacking)}"
        others = {**(sidecars or {}), **self._index()}
        assert not others.keys() & {layout.name for layout in self.files}, "a sidecar has the name of a tensor file"
        for name, content in others.items():
            assert _within(name), f"sidecar {name} is not in the folder or one below it"
            data = content if isinstance(content, bytes) else content_of(content)
            with output_errors(self._staging.files / name):
                (self._staging.files / name).parent.mkdir(exist_ok=True)
                put_file(self._staging.files / name, data)
        for name, data in (seal(self._staging.files) if seal else {}).items():
            with output_errors(self._staging.files / name):
                put_file(self._staging.files / name, data)
        for layout in self.files:
            with output_errors(self._staging.files / layout.name):
                os.fsync(self._descriptors[layout.name])
        self._staging.publish()

    def _claims(self) -> dict[str, int]:
        """What an earlier run of this very release says it wrote; any other run is cleared away."""
        claims = read_journal(self._staging.journal)
        if claims.fingerprint == self._fingerprint and self._staging.files.is_dir():
            self.remarks = claims.remarks
            return {name: crc for name, crc in claims.tensors.items() if name in self._entries}
        if self._staging.files.is_dir():
            self.notes.append(
                f"{self._staging.folder.name} is of an unfinished run with another source or recipe: deleted, starting clean"
            )
        self._staging.clear()
        return {}

    def _lay_out(self, stack: ExitStack) -> None:
        """Every file with its header and its full size, and nothing else in the folder (an earlier run may have died among its sidecars)."""
        self._staging.files.mkdir(exist_ok=True)
        names = {self._staging.files / layout.name for layout in self.files}
        for stray in [p for p in self._staging.files.rglob("*") if p.is_file() and p not in names]:
            stray.unlink()
        for layout in self.files:
            assert _within(layout.name), f"file {layout.name} is not in the folder or one below it"
            (self._staging.files / layout.name).parent.mkdir(exist_ok=True)
            descriptor = os.open(self._staging.files / layout.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, descriptor)
            os.ftruncate(descriptor, layout.nbytes)
            _pwrite(descriptor, memoryview(layout.header), 0)
            self._descriptors[layout.name] = descriptor

    def _proved(self, claims: Mapping[str, int]) -> dict[str, int]:
        """The claims that the bytes on the disk bear out."""
        kept = {name: crc for name, crc in claims.items() if self._crc(self._entries[name]) == crc}
        for name in kept:
            self._tick(self._entries[name])
        if kept:
            self.notes.append(
                f"resumed: {len(kept)} of {len(self._entries)} tensors and {len(self.finished)} of {len(self.files)} files are kept"
            )
        if len(kept) < len(claims):
            files = ", ".join(sorted({self._entries[name].file for name in claims.keys() - kept.keys()}))
            self.notes.append(
                f"{files}: {len(claims) - len(kept)} tensors changed since they were written, and are written again"
            )
        return kept

    def _crc(self, entry: TensorEntry) -> int:
        """Check sum of what lies where a tensor belongs."""
        buffer, crc = memoryview(bytearray(CHUNK)), 0
        for at in range(0, entry.nbytes, CHUNK):
            step = buffer[: min(CHUNK, entry.nbytes - at)]
            moved = os.preadv(self._descriptors[entry.file], [step], entry.start + at)
            crc = zlib.crc32(step[:moved], crc)
        return crc

    def _put(self, entry: TensorEntry, chunks: Iterable[memoryview]) -> None:
        crc, at, end = 0, entry.start, entry.start + entry.nbytes
        for chunk in chunks:
            assert at + len(chunk) <= end, f"{entry.name}: more than {entry.nbytes} bytes came"
            crc = zlib.crc32(chunk, crc)
            with output_errors(self._staging.files / entry.file, self._missing):
                _pwrite(self._descriptors[entry.file], chunk, at)
            at += len(chunk)
        assert at == end, f"{entry.name}: {at - entry.start} of {entry.nbytes} bytes came"
        with output_errors(self._staging.journal, self._missing):
            self._journal.add(entry.name, crc)
        self._tick(entry)

    def _tick(self, entry: TensorEntry) -> None:
        """Count a tensor as written; writing it again changes nothing."""
        with self._lock:
            if entry.name not in self.done:
                self.done.add(entry.name)
                self._pending[entry.file] -= 1
                self._missing -= entry.nbytes

    def _index(self) -> dict[str, bytes]:
        """The index of the files directly in the folder, where readers need one: `metadata.total_size` is the bytes of their tensors, as everywhere."""
        own = {layout.name for layout in self.files if "/" not in layout.name}
        if own == {SINGLE}:
            return {}
        entries = [entry for entry in self._entries.values() if entry.file in own]
        total = sum(entry.nbytes for entry in entries)
        weight_map = {entry.name: entry.file for entry in sorted(entries, key=lambda entry: entry.name)}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, ensure_ascii=False)
        return {INDEX_NAME: f"{text}\n".encode()}


def _within(name: str) -> bool:
    """Whether a file name is plain, or one in a plain folder."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part and part not in {".", ".."} for part in parts)


def _whole_fingerprint(fingerprint: str, files: Sequence[FileLayout]) -> str:
    """The caller's fingerprint and the layout as one: bytes of one layout mean nothing in another."""
    digest = hashlib.sha256(fingerprint.encode())
    for layout in files:
        digest.update(b"\0" + layout.name.encode() + b"\0" + layout.header)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row order; they are copied only where it is not contiguous or not in this memory."""
    rows = tensor.detach().cpu().contiguous()
    # not reshape: it keeps the odd strides of empty and one-element tensors, and then torch refuses the view
    flat = rows.as_strided((rows.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy().data)


def _pwrite(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        moved = os.pwrite(descriptor, data, at)
        data, at = data[moved:], at + moved
