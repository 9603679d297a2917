"""vLLM for CPUs, in the environment that `make engines` makes."""

from __future__ import annotations

import os
from pathlib import Path

from qwench.engines.base import Answer, Request
from qwench.engines.process import ask
from qwench.errors import EngineError

CACHE_GIB = 1
"""Memory for the KV cache: vLLM would take half of the machine."""


def home() -> Path:
    """Where the environments of engines are: `$QWENCH_ENGINES`, or `qwench/engines` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("QWENCH_ENGINES") or Path(cache) / "qwench" / "engines")


def python() -> Path:
    """The Python of vLLM's environment. Raises EngineError where there is none."""
    found = home() / "vllm" / "bin" / "python"
    if not found.is_file():
        raise EngineError(
            f"there is no vLLM in {home() / 'vllm'}", "run `make engines` (about 3.5 GB), or verify with --engine transformers"
        )
    return found


def run(request: Request) -> Answer:
    """Ask vLLM. Raises EngineError."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in one process, where its loader can be watched
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return ask(python(), "vllm_worker.py", request, settings, "vLLM")
