"""llama.cpp, as the `xllamacpp` package carries it (no compiler needed), in a process of its own under the same Python as ours.

`Request.folder` is a GGUF file, or a folder that holds one model and perhaps its `mmproj`. One thread is right on a busy machine: llama.cpp's threads wait for each other
in a loop, and where they outnumber the idle cores a run of seconds becomes minutes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwench.engines.base import ANSWER, REQUEST, Answer, Request
from qwench.engines.process import WORKERS, ask
from qwench.errors import EngineError

PACKAGE = "xllamacpp"
PINNED = "2026.10.11549"
"""The version that the worker's view of llama.cpp's structures was checked with; it refuses one whose structures look different."""


def python() -> Path:
    """The Python that has llama.cpp. Raises EngineError where there is none."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise EngineError("there is no llama.cpp in this environment", f"pip install {PACKAGE}=={PINNED}")
    return Path(sys.executable)


def run(request: Request) -> Answer:
    """Ask llama.cpp. Raises EngineError."""
    return ask(python(), "llama_cpp_worker.py", request, {}, "llama.cpp")


def scores(path: Path, rows: Sequence[Sequence[int]], starts: Sequence[int], threads: int = 1) -> list[tuple[float, bool]]:
    """What llama.cpp gives the ends of rows: (log-probability of row[start:] in nats, whether it is what greedy decoding writes).

    Args:
        path: a GGUF file.
        rows: token ids; of any lengths.
        starts: for each row, its first token that counts; at least 1.

    Raises:
        EngineError: there is no llama.cpp, or it refuses the file.
    """
    assert all(0 < start < len(row) for row, start in zip(rows, starts, strict=True))
    with tempfile.TemporaryDirectory(prefix="qwench-engine-") as name:
        folder, worker = Path(name), WORKERS / "llama_cpp_scores.py"
        request = {"path": str(path), "rows": [list(row) for row in rows], "starts": list(starts), "threads": threads}
        (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([str(python()), str(worker), name], env=environment, capture_output=True, text=True, check=False)
        try:
            return [
                (float(value), bool(greedy))
                for value, greedy in json.loads((folder / ANSWER).read_text(encoding="utf-8"))["scores"]
            ]
        except (OSError, ValueError):
            tail = "\n".join(f"  {line}" for line in done.stderr.splitlines()[-6:])
            raise EngineError(
                f"llama.cpp ended with code {done.returncode} on {path}:\n{tail}", "read the last lines above"
            ) from None
