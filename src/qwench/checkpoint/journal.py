"""Which tensors of an unfinished release are written: one line of JSON each, appended as they finish.

    {"fingerprint": "9f2c..."}
    {"tensor": "model.layers.0.mlp.gate_proj.weight_packed", "crc32": 3405691582}

A line is a claim and the check sum is its proof: whoever resumes reads the tensor's bytes back and compares. So nothing depends on the order in which
the kernel brings journal and tensors to the disk, and a file that was truncated, replaced or damaged in between is noticed, tensor by tensor. CRC-32
notices every such accident but for one in four billion and costs a quarter of a second per GB; digests that also withstand malice cost three to five times as much,
and whoever can forge a staging folder can forge the release as well.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path


class Journal:
    """An open journal; `add` may be called from several threads.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, fingerprint: str, kept: Mapping[str, int]) -> None:
        """Begin a journal, replacing whatever is at `path` in one move; `kept`: check sums of what is already written."""
        self.path, self._lock = path, threading.Lock()
        lines = [{"fingerprint": fingerprint}, *({"tensor": name, "crc32": crc} for name, crc in kept.items())]
        beside = path.with_name(path.name + ".new")
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        beside.replace(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, tensor: str, crc: int) -> None:
        """Put down a finished tensor: one write, so that a line is there or torn, never mixed with another."""
        with self._lock:
            os.write(self._descriptor, (json.dumps({"tensor": tensor, "crc32": crc}) + "\n").encode())

    def close(self) -> None:
        os.close(self._descriptor)


def read_journal(path: Path) -> tuple[str | None, dict[str, int]]:
    """(fingerprint, check sums by tensor) of a journal; (None, {}) where there is none. A torn line ends it: the run was killed there."""
    fingerprint: str | None = None
    kept: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        fingerprint = str(json.loads(lines[0])["fingerprint"])
        for line in lines[1:]:
            record = json.loads(line)
            kept[str(record["tensor"])] = int(record["crc32"])
    except (FileNotFoundError, ValueError, KeyError, IndexError, TypeError):
        pass
    return fingerprint, kept
