"""Qwench turns a Qwen3.5-family checkpoint into a release that people run.

The command line is `qwench`; the same from Python:

    import qwench

    recipe = qwench.load_recipe("nvfp4a16")
    print(qwench.plan_for(recipe, "Qwen/Qwen3.5-9B").nbytes)  # from shapes alone
    qwench.run_recipe(recipe, "Qwen/Qwen3.5-9B", Path("Qwen3.5-9B-NVFP4A16"))
    print(qwench.evaluate_release(Path("Qwen3.5-9B-NVFP4A16"), "Qwen/Qwen3.5-9B").divergence.mean)

These names are the door: they stay when rooms behind it are rebuilt. They are loaded when they are first asked for, so that `import qwench` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwench.checkpoint.reader import Checkpoint
    from qwench.errors import QwenchError
    from qwench.formats.release import open_source
    from qwench.measuring import evaluate_gguf_release, evaluate_release, verify_gguf_release, verify_release
    from qwench.models import map_of
    from qwench.recipe import Recipe, load_recipe, parse_recipe
    from qwench.result import Result, read_result
    from qwench.run import plan_for, run_recipe

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "QwenchError",
    "Recipe",
    "Result",
    "__version__",
    "evaluate_gguf_release",
    "evaluate_release",
    "load_recipe",
    "map_of",
    "open_source",
    "parse_recipe",
    "plan_for",
    "read_result",
    "run_recipe",
    "verify_gguf_release",
    "verify_release",
]
BEHIND = {
    "qwench.checkpoint.reader": ("Checkpoint",),
    "qwench.errors": ("QwenchError",),
    "qwench.formats.release": ("open_source",),
    "qwench.measuring": ("evaluate_gguf_release", "evaluate_release", "verify_gguf_release", "verify_release"),
    "qwench.models": ("map_of",),
    "qwench.recipe": ("Recipe", "load_recipe", "parse_recipe"),
    "qwench.result": ("Result", "read_result"),
    "qwench.run": ("plan_for", "run_recipe"),
}
"""Where each name of the door lives."""


def __getattr__(name: str) -> Any:
    for module, names in BEHIND.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'qwench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
