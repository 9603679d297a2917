"""llama.cpp, as the `xllamacpp` package carries it (no compiler needed), in a process of its own under the same Python as ours.

`Request.folder` is a GGUF file, or a folder that holds one model and perhaps its `mmproj`. One thread is right on a busy machine: llama.cpp's threads wait for each other
in a loop, and where they outnumber the idle cores a run of seconds becomes minutes.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from qwench.engines.base import Answer, Request
from qwench.engines.process import ask
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
