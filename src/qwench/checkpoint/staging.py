"""The hidden folder in which a release grows until it is whole.

    releases/
      .mine.partial/          beside the output folder, so that the last step is one rename within one file system
        lock                  held by the running process
        journal.jsonl         what is written
        files/                becomes releases/mine
        walk/                 hidden states between two layers, where the run needs data

The lock is the kernel's (`flock`): it ends with the process that holds it, however that ends, so none can be stale. The process id in it is for people.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qwench.errors import OutputError

Seal = Callable[[Path], Mapping[str, bytes]]
"""From the folder of a finished release, before it gets its name, to files that are put into it last: name -> content."""

OURS = {"lock", "journal.jsonl", "journal.jsonl.new", "files", "walk"}


def staging_of(out: Path) -> Path:
    """Where a release with this output folder grows."""
    out = out.resolve()
    return out.with_name(f".{out.name}.partial")


def check_output(out: Path, needed: int) -> None:
    """Whether a release of `needed` bytes can go to `out`; nothing is written.

    What an earlier, unfinished run left in the staging folder counts as free: it is either kept or deleted.

    Raises:
        OutputError: `out` is taken, its parent is missing or not writable, or the disk is too small.
    """
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {out} is a file", "choose another output folder, or remove that file")
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"the output folder {out} is not empty", "choose another output folder, or remove that one")
    if not out.parent.is_dir():
        raise OutputError(
            f"the folder {out.parent} does not exist, so {out.name} cannot be made in it", "make it first, or mend the path"
        )
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {out.parent} is not writable", "choose another output folder, or change its permissions")
    free = free_bytes(out.parent)
    left = sum(p.stat().st_blocks * 512 for p in (staging_of(out) / "files").glob("*") if p.is_file())
    if needed > free + left:
        what = f"the disk of {out.parent} is too small: {out.name} needs {needed:,} bytes, {free + left:,} are free"
        raise OutputError(what, f"free {needed - free - left:,} bytes, or choose another disk")


def free_bytes(folder: Path) -> int:
    """Bytes that we may still write to the disk of a folder."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


@contextmanager
def output_errors(path: Path, missing: int | None = None) -> Iterator[None]:
    """Turns what the operating system says about writing `path` into an OutputError.

    Args:
        missing: bytes of the release that were still to be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise OutputError(f"{path} cannot be written: {error.strerror}", "check the disk and its permissions") from error
        free = free_bytes(path.parent)
        what = f"the disk is full: {path.name} does not fit, {free:,} bytes are free"
        if missing is not None:
            what += f", {missing:,} are still to be written, {max(missing - free, 0):,} too many"
        raise OutputError(what, "free some space and run the same command again: what is written is kept for it") from error


class Staging:
    """The staging folder of one output folder, held by this process from construction to `release`.

    Attributes:
        folder: `.NAME.partial`.
        files: the folder in it that becomes the release.
        journal: path of the journal.
        walk: a folder for what a run must remember besides, made by whoever needs it; it goes when the release is published or cleared.

    Raises:
        OutputError: another run holds it, or something in it is not ours.
    """

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()
        self.folder = staging_of(out)
        self.files, self.journal, self.walk = self.folder / "files", self.folder / "journal.jsonl", self.folder / "walk"
        with output_errors(self.folder):
            self._lock = self._take()
        foreign = sorted(p.name for p in self.folder.iterdir() if p.name not in OURS)
        if foreign:
            self.release()
            raise OutputError(
                f"{self.folder} holds {foreign[0]}, which is not ours", "move that folder away: it is where the release grows"
            )

    def clear(self) -> None:
        """Forget what an earlier run left. The files go first: without its journal no file is trusted."""
        with output_errors(self.files):
            if self.files.is_dir():
                shutil.rmtree(self.files)
            self.journal.unlink(missing_ok=True)
            shutil.rmtree(self.walk, ignore_errors=True)

    def publish(self) -> None:
        """Give the finished folder its name, in one move. Raises OutputError where something took the name meanwhile."""
        with output_errors(self.out):
            sync_folder(self.files)
            self.files.rename(self.out)
            sync_folder(self.out.parent)
        shutil.rmtree(self.walk, ignore_errors=True)

    def release(self) -> None:
        """Let go of the lock; remove the folder where nothing in it is worth keeping."""
        if not self.files.exists():
            self.journal.unlink(missing_ok=True)
        (self.folder / "lock").unlink(missing_ok=True)
        os.close(self._lock)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _take(self) -> int:
        """The descriptor that holds the lock."""
        path = self.folder / "lock"
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue  # the run that held it has just removed the folder
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 32).decode(errors="replace").strip()
                os.close(descriptor)
                raise OutputError(
                    f"another run (process {holder}) is writing {self.out}", "wait for it, or choose another output folder"
                ) from None
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
            os.close(descriptor)  # the run that held it removed the file between our two calls: that lock is worth nothing


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
