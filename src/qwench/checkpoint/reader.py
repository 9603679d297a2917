"""A folder of safetensors files as a source of tensors, read lazily and part by part.

Opening reads headers only, and finds every fault that names, sizes and offsets can show. Reading asks the kernel for exactly the bytes of the part and has
them put straight into the tensor's own memory (`preadv`): nothing is copied twice. Files are not mapped into memory, although that would be shorter to write:
mapped pages count as the process's own until the kernel wants them back, and then nobody can say what a run needs.

    with Checkpoint.open(Path("Qwen3.5-35B-A3B")) as source:
        gate = source.read("model.language_model.layers.3.mlp.experts.gate_up_proj", (7, slice(0, 512)))   # 2 MB are moved, not 1 GB

All methods may be called from several threads at once.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.folder import Inventory, Wanted, raise_together, read_config, take_inventory
from qwench.checkpoint.parts import part_runs, part_shape
from qwench.checkpoint.source import BYTES_OF, TORCH_DTYPE, Part, TensorEntry
from qwench.errors import CheckpointError

CHUNK = 1 << 20
"""Bytes that are copied at a time: few enough to stay in the processor's cache between reading, checking and writing."""


class Checkpoint:
    """The stored tensors of a folder; see `TensorSource`.

    Attributes:
        folder: where it lies.
        config: the parsed `config.json`.
        tensors: every stored tensor by name.
        files: the safetensors files and their sizes in bytes.
        notes: what is odd about the folder, but no reason to stop; one sentence each, for the log and the card.
    """

    def __init__(self, folder: Path, config: dict[str, Any], inventory: Inventory) -> None:
        self.folder, self.config = folder, config
        self.tensors: Mapping[str, TensorEntry] = inventory.tensors
        self.files: Mapping[str, int] = inventory.files
        self.notes = inventory.notes
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path, wanted: Wanted | None = None) -> Checkpoint:
        """Read the headers of a folder.

        Args:
            wanted: names of the tensors that will be asked for, where a part of the shards is enough (see `hub.locate`).

        Raises:
            CheckpointError: everything that is wrong with the folder.
        """
        faults, config, inventory = [], {}, Inventory()
        try:
            config = read_config(folder)
        except CheckpointError as error:
            if not folder.is_dir():
                raise
            faults.append(error)
        try:
            inventory = take_inventory(folder, wanted)
        except CheckpointError as error:
            faults.append(error)
        raise_together(folder, faults)
        return cls(folder, config, inventory)

    def dtypes(self) -> dict[str, int]:
        """How many tensors are stored in each dtype code, most frequent first."""
        return dict(Counter(e.dtype for e in self.tensors.values()).most_common())

    def stamp(self) -> str:
        """A digest of names, sizes and times of change of the files: differs once somebody has trained or fetched over them."""
        stats = [(file, stat.st_size, stat.st_mtime_ns) for file in self.files for stat in [(self.folder / file).stat()]]
        return hashlib.sha256(repr((stats, self.config)).encode()).hexdigest()

    def read(self, name: str, part: Part = ()) -> Tensor:
        """One tensor, or a part of it, in its stored dtype; only that part is moved.

        Args:
            part: index into the leading dimensions, meaning what `tensor[part]` means in torch; steps of 1 only.

        Raises:
            CheckpointError: no such tensor, or the file changed since it was opened.
            IndexError: the part does not fit the tensor's shape.
        """
        entry = self._entry(name)
        shape = part_shape(entry.shape, part)
        flat = torch.empty(math.prod(shape) * BYTES_OF[entry.dtype], dtype=torch.uint8)
        target, filled = memoryview(flat.numpy().data), 0
        for offset, length in part_runs(entry.shape, part, BYTES_OF[entry.dtype]):
            self._fill(entry, entry.start + offset, target[filled : filled + length])
            filled += length
        return flat.view(TORCH_DTYPE[entry.dtype]).reshape(shape)

    def chunks(self, name: str, part: Part = (), size: int = CHUNK) -> Iterator[memoryview]:
        """The stored bytes of a tensor or a part, `size` at a time, not interpreted. Each chunk is valid until the next is asked for.

        Raises as `read` does.
        """
        entry = self._entry(name)
        buffer, filled = memoryview(bytearray(min(size, max(entry.nbytes, 1)))), 0
        for offset, length in part_runs(entry.shape, part, BYTES_OF[entry.dtype]):
            while length:
                step = min(length, len(buffer) - filled)
                self._fill(entry, entry.start + offset, buffer[filled : filled + step])
                offset, length, filled = offset + step, length - step, filled + step
                if filled == len(buffer):
                    yield buffer
                    filled = 0
        if filled:
            yield buffer[:filled]

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {name}", "see `qwench inspect` for what it holds")
        return self.tensors[name]

    def _fill(self, entry: TensorEntry, offset: int, target: memoryview) -> None:
        """Fill `target` from the tensor's file; one call of the kernel moves at most 2 GiB."""
        path, filled = self.folder / entry.file, 0
        try:
            descriptor = self._descriptor(entry.file)
            while filled < len(target):
                moved = os.preadv(descriptor, [target[filled:]], offset + filled)
                if moved == 0:
                    what = f"{path} ends at byte {offset + filled:,}, inside of tensor {entry.name}"
                    raise CheckpointError(what, "something changed the file while it was read: fetch it again")
                filled += moved
        except OSError as error:
            raise CheckpointError(
                f"{path}, tensor {entry.name}: {error.strerror}", "check the disk, or fetch the file again"
            ) from None

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                descriptor = os.open(self.folder / file, os.O_RDONLY | os.O_CLOEXEC)
                if hasattr(
                    os, "posix_fadvise"
                ):  # blocks come one after the other: let the kernel read ahead further than usual
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                self._descriptors[file] = descriptor
            return self._descriptors[file]
