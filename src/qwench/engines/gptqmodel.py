"""GPTQModel, in the environment that `make engines` makes: it reads GPTQ releases, alone or with an adapter of corrections (EoRA)."""

from __future__ import annotations

from pathlib import Path

from qwench.engines.base import Answer, Request
from qwench.engines.environments import python_of
from qwench.engines.process import ask

WORKERS = 2
"""GPTQModel's own count on a machine with two cores is one, and its loader asks for two: it raises ValueError then."""


def python() -> Path:
    """The Python of GPTQModel's environment. Raises EngineError where there is none."""
    return python_of("gptqmodel", "GPTQModel", "1.6 GB")


def run(request: Request) -> Answer:
    """Ask GPTQModel. Raises EngineError."""
    settings = {
        "GPTQMODEL_CPU_WORKERS": str(WORKERS),
        "TORCHDYNAMO_DISABLE": "1",  # it compiles the decoding of every shape: minutes, for a question of seconds
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return ask(python(), "gptqmodel_worker.py", request, settings, "GPTQModel")
