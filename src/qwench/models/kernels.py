"""Which code works out Gated DeltaNet: the kernels of flash-linear-attention, or the plain PyTorch that is the reference.

The classes of transformers take the kernels wherever the package `fla` can be imported, whatever the tensors are. Its kernels are for GPUs and for short floats: they fail on a processor, and
refuse float32. So they are left to run in bfloat16 on a GPU, and everything else goes the plain way, which is in the same functions, under the kernels.

The plain way is slow on a processor: two thirds of a calibration run. Passes over calibration rows, which nobody compares bit for bit with an engine, take our own code in its place
where they ask for it; what is measured against a source goes through the functions of transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

from qwench.models.chunked_delta import chunked_delta
from qwench.models.expert_products import run_experts

FUNCTIONS = ("causal_conv1d_fn", "causal_conv1d_update", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
"""Of the modules of transformers, each a choice between a kernel and the plain function that it wraps."""
CHUNKED = "torch_chunk_gated_delta_rule"


def takes_kernels(x: Tensor) -> bool:
    """Whether the layers that read `x` are left to the kernels, where there are any."""
    return x.is_cuda and x.dtype == torch.bfloat16


def quick_chunks(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> tuple[Tensor, Tensor | None]:
    """In place of `torch_chunk_gated_delta_rule`: our own where whole rows are read from the start and no state is asked for, as in every pass over calibration rows."""
    plain = named.get("initial_state") is None and not named.get("output_final_state") and named.get("use_qk_l2norm_in_kernel")
    if plain:
        return chunked_delta(query, key, value, named["g"], named["beta"]), None
    found: tuple[Tensor, Tensor | None] = getattr(REFERENCE, "__wrapped__", REFERENCE)(query, key, value, **named)
    return found


REFERENCE = dense.torch_chunk_gated_delta_rule


@contextmanager
def kernels_for(x: Tensor, quick: bool = False) -> Iterator[None]:
    """While it lasts, the layers of transformers run with what suits `x`, and say nothing about it.

    Args:
        quick: where no kernels are taken, whole rows go through our own code for Gated DeltaNet (see `chunked_delta`) and for experts (see `expert_products`): the same sums, those
            of Gated DeltaNet in another order.
    """
    replaced: list[tuple[Any, str, Any]] = []
    if not takes_kernels(x):
        for module, name in ((module, name) for module in (dense, moe) for name in FUNCTIONS):
            chosen = getattr(module, name, None)
            plain = quick_chunks if quick and name == CHUNKED else getattr(chosen, "__wrapped__", None)
            if plain is not None and chosen is not None:
                replaced.append((module, name, chosen))
                setattr(module, name, plain)
        if quick:
            replaced.append((moe.Qwen3_5MoeExperts, "forward", moe.Qwen3_5MoeExperts.forward))
            moe.Qwen3_5MoeExperts.forward = run_experts
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
