"""Which tensors of an unfinished release are written: one line of JSON each, appended as they finish.

    {"fingerprint": "9f2c..."}
    {"remark": "model.layers.0.mlp.gate_proj", "data": {"mean_abs": 0.0008}}
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Journal:
    """An open journal; `add` may be called from several threads.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, fingerprint: str, kept: Mapping[str, int], remarks: Mapping[str, Mapping[str, Any]]) -> None:
        """Begin a journal, replacing whatever is at `path` in one move; `kept`: check sums of what is already written; `remarks`: as `remark` takes them."""
        self.path, self._lock = path, threading.Lock()
        lines: list[dict[str, Any]] = [{"fingerprint": fingerprint}]
        lines += [{"remark": key, "data": data} for key, data in remarks.items()]
        lines += [{"tensor": name, "crc32": crc} for name, crc in kept.items()]
        beside = path.with_name(path.name + ".new")
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        beside.replace(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, tensor: str, crc: int) -> None:
        """Put down a finished tensor: one write, so that a line is there or torn, never mixed with another."""
        with self._lock:
            os.write(self._descriptor, (json.dumps({"tensor": tensor, "crc32": crc}) + "\n").encode())

    def remark(self, key: str, data: Mapping[str, Any]) -> None:
        """Put down what was learnt on the way, which a later run could not learn again without the work."""
        with self._lock:
            os.write(self._descriptor, (json.dumps({"remark": key, "data": data}) + "\n").encode())

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass
class Claims:
    """What a journal says.

    Attributes:
        fingerprint: of the run that wrote it; None where there is no journal.
        tensors: check sums by tensor.
        remarks: data by key; the last of equal keys.
    """

    fingerprint: str | None = None
    tensors: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_journal(path: Path) -> Claims:
    """The claims of a journal. A torn line ends it: the run was killed there."""
    claims = Claims()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        claims.fingerprint = str(json.loads(lines[0])["fingerprint"])
        for line in lines[1:]:
            record = json.loads(line)
            if "remark" in record:
                claims.remarks[str(record["remark"])] = dict(record["data"])
            else:
                claims.tensors[str(record["tensor"])] = int(record["crc32"])
    except (FileNotFoundError, ValueError, KeyError, IndexError, TypeError):
        pass
    return claims
