"""Transformers, in a process of its own under the same Python as ours."""

from __future__ import annotations

import sys
from pathlib import Path

from qwench.engines.base import Answer, Request
from qwench.engines.process import ask


def run(request: Request) -> Answer:
    """Ask transformers. Raises EngineError."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return ask(Path(sys.executable), "transformers_worker.py", request, quiet, "transformers")
