"""Holding an engine's numbers against ours where the inputs of layers are rounded (W4A4, W8A8).

Rounding is a staircase. Two computations that differ in the last bit put a number near an edge on different steps; the step is a quarter of the number, the next layer reads the
difference, and more numbers fall to the other side. So two right implementations drift apart through the depth of a network until the rounding errors of one have little to do with
those of the other, and a small divergence is no longer to be had for the asking. What can be had:

- transformers rounds by the same operations as we do, and multiplies with weights that it decoded to bfloat16. Read so, the numbers agree to the last bit or nearly.
- An engine that computes in bfloat16 agrees with our float32 about as well as our own bfloat16 does, and that is measured on the rows at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.source import Part, TensorEntry, TensorSource
from qwench.formats.release import Release
from qwench.models.map import ModelMap
from qwench.models.run import Trunk
from qwench.numerics import InputRounding

NOISE = 2.0
"""How many times further than our own bfloat16 an engine's may be from our float32."""


def rounds_inputs(source: TensorSource) -> bool:
    """Whether a release rounds what some of its layers read."""
    return isinstance(source, Release) and any(weight.scheme.activations != "none" for weight in source.stored.values())


class HeldInBfloat16:
    """A release whose decoded weights are rounded to bfloat16, as engines hold them that decode while they load; see `TensorSource`."""

    def __init__(self, release: Release) -> None:
        self.release = release

    @property
    def folder(self) -> Path:
        return self.release.folder

    @property
    def config(self) -> dict[str, Any]:
        return self.release.config

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        return self.release.tensors

    def read(self, name: str, part: Part = ()) -> Tensor:
        """As `Release.read`."""
        values = self.release.read(name, part)
        return values.to(torch.bfloat16).to(torch.float32) if name in self.release.stored else values

    def input_rounding(self, module: str) -> InputRounding | None:
        """As `Release.input_rounding`."""
        return self.release.input_rounding(module)


def drift_of_bfloat16(source: TensorSource, map: ModelMap, rows: list[list[int]]) -> float:
    """Mean KL in nats between our reading in float32 and in bfloat16, over the positions of rows of token ids that have a next one."""
    ids = torch.tensor(rows)
    wide, short = (Trunk(source, map, dtype) for dtype in (torch.float32, torch.bfloat16))
    sums = [
        divergence(wide.logits(ours[:-1]), short.logits(theirs[:-1]))
        for ours, theirs in zip(wide.forward(ids), short.forward(ids), strict=True)
    ]
    return float(torch.stack(sums).mean())


def divergence(ours_TV: Tensor, theirs_TV: Tensor) -> Tensor:
    """Mean over positions of KL(ours || theirs) of two sets of logits, in nats."""
    ours, theirs = (torch.log_softmax(logits.double(), -1) for logits in (ours_TV, theirs_TV))
    return (ours.exp() * (ours - theirs)).sum(-1).mean()
