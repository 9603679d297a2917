"""Who runs a release: each engine in a process of its own, and one line here."""

from __future__ import annotations

from qwench.engines import transformers, vllm
from qwench.engines.base import Answer, Engine, Request

ENGINES: dict[str, Engine] = {
    "transformers": transformers.run,
    "vllm": vllm.run,
}
"""Engines by the name that people type."""

__all__ = ["ENGINES", "Answer", "Engine", "Request"]
