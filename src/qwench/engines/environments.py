"""Where the engines are that have an environment of their own: `make engines` makes them, outside of the clone.

Each pins versions of torch and transformers that the others refuse, so that each gets a folder with a Python of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

from qwench.errors import EngineError


def home() -> Path:
    """Where the environments of engines are: `$QWENCH_ENGINES`, or `qwench/engines` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("QWENCH_ENGINES") or Path(cache) / "qwench" / "engines")


def python_of(folder: str, engine: str, size: str) -> Path:
    """The Python of an environment.

    Args:
        folder: its name in `home()`, and in `scripts/engines`.
        engine: what people call the engine.
        size: what the environment takes on disk, for the message.

    Raises:
        EngineError: there is none.
    """
    found = home() / folder / "bin" / "python"
    if not found.is_file():
        raise EngineError(
            f"there is no {engine} in {home() / folder}",
            f"run `make engines`, or `bash scripts/engines/make.sh {folder}` for this one alone ({size}), or verify with --engine transformers",
        )
    return found
