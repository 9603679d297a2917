"""vLLM for CPUs, in the environment that `make engines` makes."""

from __future__ import annotations

from pathlib import Path

from qwench.engines.base import Answer, Request
from qwench.engines.environments import python_of
from qwench.engines.process import ask

CACHE_GIB = 1
"""Memory for the KV cache: vLLM would take half of the machine."""


def python() -> Path:
    """The Python of vLLM's environment. Raises EngineError where there is none."""
    return python_of("vllm", "vLLM", "3.5 GB")


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
