"""A fine-tune of the dense demo checkpoint that lost its MTP head, as fine-tuning tools leave it: the trunk a little moved, the config as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwench.demo import checkpoint

MOVED = 0.02
"""Each matrix of the trunk moves by so much of its own root mean square."""


def demo_tensors(which: str = "dense") -> dict[str, Tensor]:
    """All tensors of a demo checkpoint."""
    return {
        name: tensor for path in sorted(checkpoint(which).glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def demo_config(which: str = "dense") -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint(which) / "config.json").read_text(encoding="utf-8"))
    return config


def write_beside(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], which: str = "dense") -> Path:
    """A checkpoint in one file, with the sidecars of a demo checkpoint."""
    folder.mkdir(parents=True)
    for path in checkpoint(which).iterdir():
        if path.suffix != ".safetensors" and path.name not in {"config.json", "model.safetensors.index.json"}:
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_finetune(
    folder: Path,
    which: str = "dense",
    lost: Callable[[str], bool] = lambda name: name.startswith("mtp."),
    moved: float = MOVED,
    seed: int = 3,
) -> Path:
    """A fine-tune of a demo checkpoint; `lost` says which tensors its tool dropped."""
    generator = torch.Generator().manual_seed(seed)
    kept = {name: tensor for name, tensor in demo_tensors(which).items() if not lost(name)}
    for name, tensor in kept.items():
        if tensor.dim() == 2 and "visual" not in name:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().square().mean().sqrt()
            kept[name] = (tensor.float() + moved * noise).to(tensor.dtype)
    return write_beside(folder, demo_config(which), kept, which)
