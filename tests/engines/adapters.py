"""Corrections that matter: an adapter of random factors for every quantized weight of a release, so that no agreement with it can be an accident."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwench.formats import adapter
from qwench.formats.release import Release, open_source
from qwench.models import map_of
from qwench.models.run import Trunk
from qwench.steps.checks.verify import our_logprobs, row_divergence

RANK = 16
STRENGTH = 0.4
"""Norm of a correction over the norm of its weight."""


def write_adapter(
    release: Path, out: Path, rank: int = RANK, seed: int = 3, wanted: Callable[[str], bool] = lambda module: True
) -> Path:
    """Write an adapter for the quantized weights of a release.

    Args:
        out: the folder to make; not the release's own.
        wanted: which modules get a correction.
    """
    source = open_source(release)
    assert isinstance(source, Release)
    shapes = {weight.module: weight.shape for weight in source.stored.values() if wanted(weight.module)}
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for module, shape in shapes.items():
        norm = float(source.read(f"{module}.weight").norm())
        tensors |= adapter.pack(module, factors(shape, adapter.rank_of(shape, rank), STRENGTH * norm, generator))
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {spec.name: spec.shape for spec in adapter.layout(shapes, rank)}
    out.mkdir()
    save_file(tensors, out / adapter.WEIGHTS_NAME, metadata={"format": "pt"})
    config = adapter.adapter_config(shapes, rank, str(release))
    (out / adapter.CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return out


def factors(shape: tuple[int, int], rank: int, norm: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] in bfloat16, with |B A| about `norm`."""
    rows, columns = shape
    right_RI = torch.randn(rank, columns, generator=generator) / columns**0.5
    left_OR = torch.randn(rows, rank, generator=generator) * norm / (rows * rank) ** 0.5
    return right_RI.to(torch.bfloat16), left_OR.to(torch.bfloat16)


def effect(release: Path, adapter_folder: Path, rows: list[list[int]]) -> float:
    """What the corrections do: mean KL in nats between our own reading with them and without."""
    plain = open_source(release)
    corrected = adapter.Corrected(plain, adapter.Adapter(adapter_folder))
    logprobs = [list(our_logprobs(Trunk(source, map_of(source)), rows)) for source in (corrected, plain)]
    return float(
        np.mean([row_divergence(ours, None, theirs.numpy())[0].mean() for ours, theirs in zip(*logprobs, strict=True)])
    )
