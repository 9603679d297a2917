"""The text of the demo checkpoints: Python 3.11's own standard library, as code and as questions and answers.

Both the sources and their docstrings may be redistributed under the PSF licence (see `src/qwench/demo/LICENSE-text`).
Modules are dealt into three disjoint sets by the hash of their path, so that the same Python gives the same text:
`held` (never trained on: evaluation), `calibration` (trained on, and carried for calibrated recipes) and `train`.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from pathlib import Path

HELD_SHARE, CALIBRATION_SHARE = 0.06, 0.06
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"}


def modules() -> list[Path]:
    """Every module of the standard library that is worth reading, in a stable order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [p for p in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(p.relative_to(root).parts)]
    return sorted(p for p in found if 1_000 < p.stat().st_size < 200_000)


def deal(path: Path) -> str:
    """The set that a module belongs to."""
    root = Path(sysconfig.get_paths()["stdlib"])
    digest = hashlib.sha256(str(path.relative_to(root)).encode()).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32
    if share < HELD_SHARE:
        return "held"
    return "calibration" if share < HELD_SHARE + CALIBRATION_SHARE else "train"


def chats(source: str, module: str) -> list[str]:
    """Each documented function or class of a module as one ChatML exchange."""
    exchanges = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            answer = ast.get_docstring(node)
            if answer and len(answer) > 40 and not node.name.startswith("_"):
                question = f"What does `{node.name}` in the module `{module}` do?"
                exchanges.append(
                    f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
                    f"<think>\n\n</think>\n\n{answer}<|im_end|>\n"
                )
    return exchanges


def documents(which: str) -> list[str]:
    """The documents of one set: each module's source, then its chats as one more document."""
    found = []
    for path in modules():
        if deal(path) != which:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            exchanges = chats(source, path.stem)
        except (SyntaxError, UnicodeDecodeError):
            continue
        found.append(source)
        if exchanges:
            found.append("".join(exchanges))
    return found
