"""Which code works out Gated DeltaNet: the kernels of flash-linear-attention, or the plain PyTorch that is the reference.

The classes of transformers take the kernels wherever the package `fla` can be imported, whatever the tensors are. Its kernels are for GPUs and for short floats: they fail on a processor, and
refuse float32. So they are left to run in bfloat16 on a GPU, and everything else goes the plain way, which is in the same functions, under the kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

FUNCTIONS = ("causal_conv1d_fn", "causal_conv1d_update", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
"""Of the modules of transformers, each a choice between a kernel and the plain function that it wraps."""


def takes_kernels(x: Tensor) -> bool:
    """Whether the layers that read `x` are left to the kernels, where there are any."""
    return x.is_cuda and x.dtype == torch.bfloat16


@contextmanager
def kernels_for(x: Tensor) -> Iterator[None]:
    """While it lasts, the layers of transformers run with what suits `x`, and say nothing about it."""
    replaced: list[tuple[ModuleType, str, Any]] = []
    if not takes_kernels(x):
        for module, name in ((module, name) for module in (dense, moe) for name in FUNCTIONS):
            chosen = getattr(module, name, None)
            plain = getattr(chosen, "__wrapped__", None)
            if plain is not None:
                replaced.append((module, name, chosen))
                setattr(module, name, plain)
    try:
        with quiet():
            yield
    finally:
        for module, name, chosen in replaced:
            setattr(module, name, chosen)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop the lines in which transformers says that it uses its own PyTorch implementation: here that is meant so."""

    def unasked(record: logging.LogRecord) -> bool:
        return "falling back to its reference PyTorch implementation" not in record.getMessage()

    logger = logging.getLogger("transformers.integrations.hub_kernels")
    logger.addFilter(unasked)
    try:
        yield
    finally:
        logger.removeFilter(unasked)
