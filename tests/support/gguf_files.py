"""A GGUF file read back with the gguf library, and one made from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.formats.gguf import plan_gguf
from qwench.formats.gguf_writer import write_gguf
from qwench.models import map_of


def make_gguf(folder: Path, path: Path, **plan: Any) -> Path:
    """Write a checkpoint as a GGUF file; `plan` goes to `plan_gguf`."""
    with Checkpoint.open(folder) as source:
        write_gguf(plan_gguf(source, map_of(source), **plan), source, path)
    return path


def tensors_of(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Every tensor of a file: its type, and its values in float32 with torch's order of dimensions."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        values = gguf.dequantize(np.array(tensor.data), tensor.tensor_type).astype(np.float32)
        found[tensor.name] = (tensor.tensor_type.name, torch.from_numpy(values).reshape(shape))
    return found


def metadata_of(path: Path) -> dict[str, Any]:
    """Every field of a file but those of the container itself."""
    return {f.name: f.contents() for f in gguf.GGUFReader(path).fields.values() if not f.name.startswith("GGUF.")}
