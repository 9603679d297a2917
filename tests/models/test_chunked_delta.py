"""Our Gated DeltaNet over whole rows against that of transformers, and its gradients against autograd's through it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

from qwench.models import chunked_delta as module
from qwench.models.chunked_delta import chunked_delta
from qwench.models.chunks import solved
from qwench.models.kernels import kernels_for

SHAPES = [(2, 100, 2, 6, 16, 24), (1, 32, 3, 3, 8, 8), (3, 7, 1, 2, 12, 4), (2, 65, 2, 4, 8, 16)]
"""Rows, positions, heads of keys and of values, their widths."""


def literal(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The function of transformers, without any kernel."""
    with kernels_for(query):
        found: Tensor = dense.torch_chunk_gated_delta_rule(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
    return found


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    rows, length, heads, value_heads, width, value_width = shape
    made = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=made).to(dtype)

    query, key = normal(rows, length, heads, width), normal(rows, length, heads, width)
    value = normal(rows, length, value_heads, value_width)
    g = -torch.rand(rows, length, value_heads, generator=made) * 3
    return [query, key, value, g, torch.rand(rows, length, value_heads, generator=made).to(dtype)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_literal_one(shape: tuple[int, ...]) -> None:
    given = inputs(shape)
    wanted = literal(*given)
    assert torch.allclose(chunked_delta(*given), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_those_of_autograd(shape: tuple[int, ...]) -> None:
    def gradients(function) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [x.clone().requires_grad_() for x in inputs(shape)]
        read = function(*leaves)
        read.backward(torch.randn(read.shape, generator=torch.Generator().manual_seed(5)))
        return [leaf.grad for leaf in leaves]

    for ours, theirs in zip(gradients(chunked_delta), gradients(literal), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_gates_that_ask_for_no_gradient_get_none() -> None:
    query, key, value, g, beta = inputs(SHAPES[0])
    query.requires_grad_()
    chunked_delta(query, key, value, g, beta).sum().backward()
    assert query.grad is not None and g.grad is None and beta.grad is None


def test_repeated_tokens_that_do_not_decay() -> None:
    """The systems of chunks are as far from the unit matrix as they can be: powers of their triangles would not do."""
    query, key, value, g, _ = inputs((1, 130, 1, 1, 8, 8))
    key, g, beta = key[:, :1].expand_as(key), torch.zeros_like(g), torch.full_like(g, 0.999)
    wanted = literal(query, key, value, g, beta)
    assert torch.allclose(chunked_delta(query, key, value, g, beta), wanted, rtol=0, atol=1e-5)


def test_rows_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs((5, 40, 2, 4, 8, 8))
    whole = chunked_delta(*given)
    monkeypatch.setattr(module, "ELEMENTS", 2 * 40 * 4 * 8)
    assert torch.allclose(chunked_delta(*given), whole, rtol=0, atol=1e-6)


def test_bfloat16_is_worked_out_in_float32() -> None:
    given = inputs(SHAPES[0], torch.bfloat16)
    read = chunked_delta(*given)
    assert read.dtype == torch.bfloat16
    wanted = chunked_delta(*(x.float() for x in given))
    assert torch.equal(read, wanted.bfloat16())


@pytest.mark.parametrize("size", [8, 32, 64])
def test_solved(size: int) -> None:
    lower = torch.rand(3, 2, size, size, generator=torch.Generator().manual_seed(0)).tril(-1) / 2
    assert torch.allclose(solved(lower) @ (lower + torch.eye(size)), torch.eye(size).expand(3, 2, -1, -1), atol=1e-4)


def test_layers_take_it_where_they_are_told_to() -> None:
    plain = dense.torch_chunk_gated_delta_rule
    with kernels_for(torch.zeros(1), quick=True):
        quick = dense.torch_chunk_gated_delta_rule
        assert moe.torch_chunk_gated_delta_rule is quick
        given = inputs(SHAPES[0])
        named = {"g": given[3], "beta": given[4], "use_qk_l2norm_in_kernel": True}
        assert torch.equal(quick(*given[:3], **named)[0], chunked_delta(*given))
        read, state = quick(*given[:3], **named, output_final_state=True)
    assert state is not None and torch.equal(read, literal(*given))
    assert dense.torch_chunk_gated_delta_rule is plain
