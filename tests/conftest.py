"""What all tests share.

Tests that need an engine with an environment of its own skip where it is absent, and say so in the summary. Ctrl-C means Ctrl-C also where the suite was
started in the background of a shell, which makes its children deaf to it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from qwench.engines import auto_round, gptqmodel, llama_cpp, vllm
from qwench.errors import EngineError

PYTHONS: dict[str, Callable[[], Path]] = {
    "vllm": vllm.python,
    "llama.cpp": llama_cpp.python,
    "gptqmodel": gptqmodel.python,
    "auto-round": auto_round.python,
}

signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("engine"):
            try:
                PYTHONS[marker.args[0]]()
            except EngineError as error:
                item.add_marker(pytest.mark.skip(reason=str(error).replace("\n", "; ")))
