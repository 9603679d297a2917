"""The two small trained checkpoints that the package carries, in the published layouts, and their text.

`dense/`: conditional generation with vision tower and MTP head. `moe/`: trunk experts fused, MTP experts one by one. How they were trained and how good they are:
docs/demo.md. The towers are initialized, not trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).parent


def checkpoint(which: Literal["dense", "moe"]) -> Path:
    """The folder of a demo checkpoint."""
    return FOLDER / which


def text(which: Literal["held", "calibration"]) -> Path:
    """A JSONL file of documents: `held` was never trained on, `calibration` was."""
    return FOLDER / "text" / f"{which}.jsonl"
