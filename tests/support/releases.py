"""Releases of small checkpoints for tests of engines."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from qwench.display import Report
from qwench.recipe import load_recipe
from qwench.run import run_recipe


def release(model: Path, recipe: str, out: Path) -> Path:
    """A release of a checkpoint by a bundled recipe."""
    run_recipe(
        load_recipe(recipe), str(model), out, 1, Report("test", "bytes", None), accept_any=True
    )  # random heads accept nothing
    return out


def rewrite(folder: Path, change: dict[str, str | None]) -> Path:
    """Rename stored tensors, or drop them (None): what a broken exporter leaves. All end up in one file."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    for old, new in change.items():
        moved = tensors.pop(old)
        if new is not None:
            tensors[new] = moved
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found
