"""A release of a few large files that are written one after the other, each from its first byte to its last.

`CheckpointWriter` keeps single tensors of an unfinished release; formats whose files are streams (GGUF) keep whole files. The rest is the same: everything grows in the
staging folder, a finished file goes down in the journal with its check sum, whoever resumes reads it back and compares, and `commit` alone gives the folder its name.

    with WholeFiles(out, {"a.gguf": 1000, "b.gguf": 2000}, fingerprint) as files:
        for name in files.left:
            crc = write(files.path(name))
            files.finished(name, crc)
        files.commit({"config.json": text})
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from qwench.checkpoint.journal import Journal, read_journal
from qwench.checkpoint.sidecars import content_of, put_file
from qwench.checkpoint.staging import Seal, Staging, check_output, output_errors

CHUNK = 1 << 22


class WholeFiles:
    """A release in the making, held by this process while in a `with`.

    Args:
        out: the folder that is to appear.
        sizes: bytes of every file, by name; None where nobody knows before it is written, and its size does not matter (a small one).
        fingerprint: of all that the bytes follow from. An unfinished run with the same one is continued, another one is deleted.
        others: bytes of everything else, for the check of free space.

    Attributes:
        done: files that are written; after entering, those of an earlier run.
        remarks: what was put down with `remark`, by an earlier run too.
        notes: what became of an earlier run; one sentence each.

    Raises:
        OutputError: on entering, where nothing can be written (see `staging.check_output`).
    """

    def __init__(self, out: Path, sizes: Mapping[str, int | None], fingerprint: str, others: int = 0) -> None:
        assert all(Path(name).name == name for name in sizes)
        self.out, self.sizes, self.others, self._fingerprint = out, dict(sizes), others, fingerprint
        self.done: set[str] = set()
        self.remarks: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._open = ExitStack()

    @property
    def left(self) -> list[str]:
        """Files that are still to be written, in their order."""
        return [name for name in self.sizes if name not in self.done]

    @property
    def scratch(self) -> Path:
        """A folder beside the unfinished files for what a run must remember besides; it goes with the commit."""
        return self._staging.walk

    def path(self, name: str) -> Path:
        """Where a file grows."""
        assert name in self.sizes, f"{name} is not planned"
        return self._staging.files / name

    def __enter__(self) -> WholeFiles:
        check_output(self.out, sum(size or 0 for size in self.sizes.values()) + self.others)
        with ExitStack() as stack:
            self._staging = Staging(self.out)
            stack.callback(self._staging.release)
            kept = self._kept()
            with output_errors(self._staging.files):
                self._staging.files.mkdir(exist_ok=True)
                for stray in [p for p in self._staging.files.iterdir() if p.name not in kept]:
                    stray.unlink()
                self._journal = Journal(self._staging.journal, self._fingerprint, kept, self.remarks)
            stack.callback(self._journal.close)
            self.done = set(kept)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def finished(self, name: str, crc: int) -> None:
        """Put down a file that is whole and on the disk, with the CRC-32 of its bytes."""
        size, planned = self.path(name).stat().st_size, self.sizes[name]
        assert planned in (None, size), f"{name} has {size} bytes, planned were {planned}"
        with output_errors(self._staging.journal):
            self._journal.add(name, crc)
        self.done.add(name)

    def remark(self, key: str, data: dict[str, Any]) -> None:
        """Keep something that was learnt on the way for the record, across runs."""
        with output_errors(self._staging.journal):
            self._journal.remark(key, data)
        self.remarks[key] = data

    def commit(self, sidecars: Mapping[str, bytes | Path], seal: Seal | None = None) -> None:
        """Add the other files, those that `seal` makes of the whole folder last, and let the folder appear."""
        assert not self.left, f"{self.left} were never written"
        for name, content in sidecars.items():
            assert name not in self.sizes and Path(name).name == name
            data = content if isinstance(content, bytes) else content_of(content)
            with output_errors(self._staging.files / name):
                put_file(self._staging.files / name, data)
        for name, made in (seal(self._staging.files) if seal else {}).items():
            with output_errors(self._staging.files / name):
                put_file(self._staging.files / name, made)
        self._staging.publish()

    def _kept(self) -> dict[str, int]:
        """Files of an earlier run of this very release that are what its journal says; any other run is cleared away."""
        claims = read_journal(self._staging.journal)
        if not self._staging.files.is_dir():
            return {}
        if claims.fingerprint != self._fingerprint:
            name = self._staging.folder.name
            self.notes.append(f"{name} is of an unfinished run with another source or recipe: deleted, starting clean")
            self._staging.clear()
            return {}
        self.remarks = claims.remarks
        claimed = {name: crc for name, crc in claims.tensors.items() if name in self.sizes}
        kept = {name: crc for name, crc in claimed.items() if self._is(name, crc)}
        if kept:
            self.notes.append(f"resumed: {len(kept)} of {len(self.sizes)} files are kept")
        if changed := sorted(claimed.keys() - kept.keys()):
            self.notes.append(f"{', '.join(changed)} changed since they were written, and are written again")
        return kept

    def _is(self, name: str, crc: int) -> bool:
        path = self.path(name)
        return path.is_file() and self.sizes[name] in (None, path.stat().st_size) and crc_of(path) == crc


def crc_of(path: Path) -> int:
    """CRC-32 of a file."""
    crc, buffer = 0, memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while moved := file.readinto(buffer):
            crc = zlib.crc32(buffer[:moved], crc)
    return crc
