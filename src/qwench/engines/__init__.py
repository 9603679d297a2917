"""Who runs a release: each engine in a process of its own, and one line here."""

from __future__ import annotations

from qwench.engines import auto_round, gptqmodel, llama_cpp, transformers, vllm
from qwench.engines.base import Answer, Engine, Request

ENGINES: dict[str, Engine] = {
    "transformers": transformers.run,
    "vllm": vllm.run,
    "gptqmodel": gptqmodel.run,
    "auto-round": auto_round.run,
    "llama.cpp": llama_cpp.run,
}
"""Engines by the name that people type."""

__all__ = ["ENGINES", "Answer", "Engine", "Request"]
