"""A checkpoint that is nowhere on disk: tensors and a config in memory, as a `TensorSource`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.source import Part, TensorEntry
from tests.support.tiny import Experts, Head, Layout, tiny_config, tiny_shapes, tiny_tensors

CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}


class MemorySource:
    """Tensors by name; `reads` notes every (name, part) that was asked for."""

    def __init__(self, config: dict[str, Any], values: Mapping[str, Tensor]) -> None:
        self.folder, self.config, self.values = Path("memory"), config, dict(values)
        self.reads: list[tuple[str, Part]] = []

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        return {n: TensorEntry(n, CODES[t.dtype], tuple(t.shape), "model.safetensors") for n, t in self.values.items()}

    def read(self, name: str, part: Part = ()) -> Tensor:
        self.reads.append((name, part))
        return self.values[name][part].clone()


def tiny_source(
    *, moe: bool = False, layout: Layout = "conditional", trunk_experts: Experts = "fused", mtp: Head | None = "published",
    vision: bool = True, tied: bool = False, seed: int = 0,
) -> MemorySource:  # fmt: skip
    """What `write_tiny` would write, in memory."""
    config = tiny_config(moe=moe, layout=layout, mtp=mtp is not None, vision=vision, tied=tied)
    shapes = tiny_shapes(config, trunk_experts, "fused" if mtp == "fused" else "single")
    return MemorySource(config, tiny_tensors(shapes, seed=seed))
