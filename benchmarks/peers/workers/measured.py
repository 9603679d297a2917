"""What every worker shares: its job, and what the job took. Standard library alone, for each worker runs under the Python of another tool.

    python SOME_worker.py FOLDER          # FOLDER/job.json says what to do; FOLDER/report.json is written at the end

A worker imports its tool first and calls `begin` then: what the interpreter and the libraries hold at that point is not counted against the method.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """Attributes:
    model: the checkpoint.
    out: where the result goes; does not exist yet.
    rows: token ids, rows of equal length.
    method: one of the worker's own.
    settings: of the method.
    """

    model: Path
    out: Path
    rows: list[list[int]]
    method: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """What was taken before the job began: resident bytes, the largest of them so far, and processor seconds."""

    resident: int
    peak_reset: bool
    seconds: float


def begin() -> Start:
    """Call after the imports. The kernel is asked to forget the peak so far: importing may hold more for a moment than the job ever does."""
    gc.collect()
    return Start(memory("VmRSS"), _forget_peak(), processor_seconds())


def job() -> Job:
    folder = Path(sys.argv[1])
    told = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    rows = json.loads(Path(told["rows"]).read_text(encoding="utf-8"))["ids"]
    return Job(Path(told["model"]), Path(told["out"]), rows, told["method"], told["settings"])


def finish(start: Start, packages: tuple[str, ...], **said: Any) -> None:
    """Write the report.

    Args:
        packages: whose versions it tells.
        said: anything else worth keeping.
    """
    report = {
        "resident_after_imports": start.resident, "peak": memory("VmHWM"), "peak_of_job": start.peak_reset,
        "import_seconds": start.seconds, "job_seconds": processor_seconds() - start.seconds, "versions": {name: version(name) for name in packages}, **said,
    }  # fmt: skip
    (Path(sys.argv[1]) / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def memory(what: str) -> int:
    """A line of /proc/self/status in bytes: `VmRSS` now, `VmHWM` at its highest. getrusage would count what the parent held when it forked."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel tells no {what}")


def processor_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    return sum(
        used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _forget_peak() -> bool:
    """Whether the kernel has set VmHWM back to what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return memory("VmHWM") <= memory("VmRSS") + 2**20


def leave() -> None:
    """End at once. Some tools leave threads behind that keep the interpreter waiting, which is no part of their work."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        os._exit(0)


class TextProcessor:
    """A processor of conversations without images, around a tokenizer. Tools that load whole conditional-generation models ask for one, and the real one wants torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template
        self.apply_chat_template: Callable[..., Any] = tokenizer.apply_chat_template

    def __call__(self, text: Any = None, images: Any = None, videos: Any = None, **arguments: Any) -> Any:
        return self.tokenizer(text, **arguments)

    def save_pretrained(self, folder: str, **arguments: Any) -> None:
        self.tokenizer.save_pretrained(folder)
