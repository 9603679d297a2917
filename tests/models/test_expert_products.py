"""Experts on uneven numbers of tokens against the module of transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

from qwench.models.expert_products import ROWS, even, even_linear, run_experts
from qwench.models.kernels import kernels_for

EXPERTS, WIDTH, HIDDEN, TOKENS, CHOSEN = 5, 24, 40, 33, 2


def module(dtype: torch.dtype) -> Any:
    config = SimpleNamespace(
        num_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=WIDTH, hidden_act="silu", _experts_implementation="eager"
    )
    made = moe.Qwen3_5MoeExperts(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.2)
    return made.to(dtype)


def routed(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts, shares; no token goes to the last expert."""
    generator = torch.Generator().manual_seed(2)
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:CHOSEN] for _ in range(TOKENS)])
    shares = torch.rand(TOKENS, CHOSEN, generator=generator).to(dtype)
    return torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype), chosen, shares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_module_of_transformers(dtype: torch.dtype) -> None:
    experts, given = module(dtype), routed(dtype)
    assert torch.equal(run_experts(experts, *given), experts(*given))


def test_gradients_equal_those_of_the_module() -> None:
    experts, (hidden, chosen, shares) = module(torch.float32), routed(torch.float32)

    def gradients(function: Any) -> list[Tensor]:
        leaf = hidden.clone().requires_grad_()
        experts.zero_grad()
        function(leaf, chosen, shares).square().sum().backward()
        return [leaf.grad, *(parameter.grad.clone() for parameter in experts.parameters())]  # type: ignore[list-item]

    ours = gradients(lambda *given: run_experts(experts, *given))
    for mine, theirs in zip(ours, gradients(experts), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


def test_products_of_few_shapes() -> None:
    for count in (1, ROWS - 1, ROWS, ROWS + 1):
        x, weight = torch.randn(count, 12).bfloat16(), torch.randn(7, 12).bfloat16()
        assert len(even(x)) % ROWS == 0
        assert torch.equal(even_linear(x, weight), F.linear(even(x), weight)[:count])
        assert even(x.float()).shape == x.shape


def test_the_module_has_its_own_back_afterwards() -> None:
    own = moe.Qwen3_5MoeExperts.forward
    with kernels_for(torch.zeros(1), quick=True):
        assert moe.Qwen3_5MoeExperts.forward is run_experts
    assert moe.Qwen3_5MoeExperts.forward is own
