"""One engine, one process: write the request, run the worker, read the answer, say what went wrong.

A worker runs in a temporary folder of its own, since some engines write logs into the folder that they are started in (GPTQModel: `logs/gptq_log_*.log`).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections import deque
from pathlib import Path

from qwench.engines.base import REQUEST, Answer, Request, read_answer
from qwench.errors import EngineError

WORKERS = Path(__file__).parent / "workers"
SAID = "stderr"
"""The file that a worker's output goes to."""
TAIL = 12
"""Lines of the worker's stderr that an error shows."""


def ask(python: Path, worker: str, request: Request, environment: dict[str, str], engine: str) -> Answer:
    """Run `workers/<worker>` with a Python, and return its answer.

    Raises:
        EngineError: it took too long, died, or left no answer; the end of what it said is in the message.
    """
    with tempfile.TemporaryDirectory(prefix="qwench-engine-") as name:
        folder = Path(name).absolute()
        (folder / REQUEST).write_text(request.to_json(), encoding="utf-8")
        command = [str(python.absolute()), str((WORKERS / worker).absolute()), str(folder)]
        code = _run(command, folder, _environment(request, environment), request, engine)
        try:
            return read_answer(folder)
        except (OSError, ValueError, TypeError):
            raise EngineError(
                f"{engine} ended with code {code} and without an answer for {request.folder}:\n{_tail(folder / SAID)}",
                "read the last lines above; where the environment itself is damaged, delete it and run `make engines`",
            ) from None


def _environment(request: Request, extra: dict[str, str]) -> dict[str, str]:
    """Offline, on few threads, without this process's Python path."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return ours | offline | {"OMP_NUM_THREADS": str(request.threads), "CUDA_VISIBLE_DEVICES": ""} | extra


def _run(command: list[str], folder: Path, environment: dict[str, str], request: Request, engine: str) -> int:
    """Run to the end in a folder, everything that it prints into `SAID` there. Raises EngineError after the timeout."""
    said, timeout = folder / SAID, request.timeout
    with said.open("wb") as output:
        try:
            return subprocess.run(
                command, stdout=output, stderr=output, env=environment, cwd=folder, timeout=timeout
            ).returncode
        except subprocess.TimeoutExpired:
            raise EngineError(
                f"{engine} was not done with {request.folder} after {request.timeout:.0f} s:\n{_tail(said)}",
                "give it fewer rows or more threads, or a longer timeout",
            ) from None


def _tail(said: Path) -> str:
    with said.open(encoding="utf-8", errors="replace") as lines:
        return "".join(f"  {line}" for line in deque(lines, maxlen=TAIL)).rstrip()
