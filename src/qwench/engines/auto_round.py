"""auto-round, in the environment that `make engines` makes: transformers opens the file, auto-round builds and runs the quantized layers."""

from __future__ import annotations

from pathlib import Path

from qwench.engines.base import Answer, Request
from qwench.engines.environments import python_of
from qwench.engines.process import ask


def python() -> Path:
    """The Python of auto-round's environment. Raises EngineError where there is none."""
    return python_of("auto-round", "auto-round", "1.6 GB")


def run(request: Request) -> Answer:
    """Ask auto-round. Raises EngineError."""
    settings = {"TORCHDYNAMO_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return ask(python(), "auto_round_worker.py", request, settings, "auto-round")
