"""GGUF's quantized types: bit for bit what llama.cpp makes, where it is installed; hashes of the same elsewhere; and what importance is for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from qwench.numerics.ggml import PLAIN, QUANTIZED, decode, encode, encode_with_llama_cpp

ERRORS = {
    "Q8_0": 0.006, "Q6_K": 0.02, "Q5_K": 0.037, "Q5_1": 0.045, "Q5_0": 0.045, "Q4_K": 0.073,
    "Q4_1": 0.09, "Q4_0": 0.11, "IQ4_NL": 0.08, "IQ4_XS": 0.08, "Q3_K": 0.15,
}  # fmt: skip
"""Bounds for the relative error on a Gaussian matrix."""


def whole_numbers(count: int) -> Tensor:
    """The same numbers on every machine and with every version of torch: int64, -2^20..2^20."""
    state, found = 12345, []
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        found.append((state >> 10) - 2**20)
    return torch.tensor(found)


def bell(rows: int, columns: int) -> Tensor:
    """Sums of four uniform numbers, around 0.02 wide, exact in float32."""
    return whole_numbers(4 * rows * columns).view(4, rows, columns).sum(0).float() / 2**26


def matrices() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    yield "gaussian", torch.randn(24, 512, generator=generator) * 0.02
    yield "heavy tails", torch.randn(24, 512, generator=generator) ** 3 * 0.1
    yield "bfloat16", (torch.randn(24, 768, generator=generator) * 0.02).bfloat16().float()
    yield "one row", torch.randn(1, 256, generator=generator)
    odd = torch.randn(16, 512, generator=generator)
    odd[:, :64], odd[3], odd[5], odd[6] = 0, 0, 1.5, -2
    odd[7], odd[8], odd[9] = torch.arange(512) / 100, odd[8].abs(), -odd[9].abs()
    odd[10:13] *= torch.tensor([[1e-9], [1e-20], [1e3]])
    yield "zeros, constants, one sign, tiny and huge", odd
    outliers = torch.rand(24, 512, generator=generator) < 0.01
    yield "outliers", torch.where(outliers, 5.0, 0.03) * torch.randn(24, 512, generator=generator)


def importances(columns: int) -> Iterator[Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    yield None
    yield torch.rand(columns, generator=generator) ** 4 * 3
    yield torch.where(torch.rand(columns, generator=generator) < 0.3, 0.0, 1.0)


@pytest.mark.engine("llama.cpp")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_bytes_are_those_of_llama_cpp(kind: str) -> None:
    for name, rows in matrices():
        for importance in importances(rows.shape[1]):
            ours, theirs = encode(kind, rows, importance), encode_with_llama_cpp(kind, rows, importance)
            assert ours == theirs, f"{name}, {'with' if importance is not None else 'without'} importance"


HASHES = {
    "Q8_0": "db1cbe8ad5530ee4",
    "Q5_0": "733d39d40a6d7450",
    "Q5_1": "8aba56bcc61c2f35",
    "Q4_0": "12d8e9dac7cef620",
    "Q4_1": "d5deb769bc709826",
    "IQ4_NL": "6501cd436edb3d29",
    "IQ4_XS": "c2d8672583efd9d9",
    "Q6_K": "dfceb88f4c789170",
    "Q5_K": "2078a497b24ecc10",
    "Q4_K": "8cc63345f771f98c",
    "Q3_K": "c2194280e13ad985",
}
"""Of the bytes that llama.cpp itself made of the same numbers on x86-64."""


@pytest.mark.parametrize("kind", QUANTIZED)
def test_bytes_are_those_that_llama_cpp_made_once(kind: str) -> None:
    rows, importance = bell(12, 512), (whole_numbers(512).abs() % 1000).float() / 256
    digest = hashlib.sha256(encode(kind, rows) + encode(kind, rows, importance)).hexdigest()
    assert digest[:16] == HASHES[kind]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_values_come_back(kind: str) -> None:
    rows = bell(8, 1024)
    found = decode(kind, encode(kind, rows), 1024)
    error = float((found - rows).norm() / rows.norm())
    assert ERRORS[kind] / 2 < error < ERRORS[kind]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_values_on_the_grid_come_back_exactly(kind: str) -> None:
    """What was decoded once is on a grid of the type; coding it again must not move it (beyond the scales' own rounding)."""
    rows = decode(kind, encode(kind, bell(4, 256)), 256)
    again = decode(kind, encode(kind, rows), 256)
    assert float((again - rows).norm() / rows.norm()) < 0.3 * ERRORS[kind]


@pytest.mark.parametrize("kind", [k for k in QUANTIZED if k != "Q8_0"])
def test_importance_moves_the_error_to_where_it_matters_less(kind: str) -> None:
    rows = bell(16, 512)
    importance = torch.ones(512)
    importance[::7] = 200.0
    guided, plain = (decode(kind, encode(kind, rows, w), 512) for w in (importance, None))
    assert ((guided - rows).square() * importance).sum() < 0.95 * ((plain - rows).square() * importance).sum()


def test_threads_make_no_difference() -> None:
    rows, before = bell(64, 2048), torch.get_num_threads()
    one = encode("Q4_K", rows)
    try:
        torch.set_num_threads(3)
        assert encode("Q4_K", rows) == one
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", PLAIN)
def test_unquantized(kind: str) -> None:
    rows = torch.tensor([[1.0, -2.5, 1 / 3, 3.0e-5]])
    expected = gguf.quantize(rows.numpy(), gguf.GGMLQuantizationType[kind]).view(np.uint8)
    assert encode(kind, rows) == encode_with_llama_cpp(kind, rows) == expected.tobytes()
    torch.testing.assert_close(decode(kind, encode(kind, rows), 4), rows.to(PLAIN[kind]).float())


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_the_gguf_library_agrees_where_it_can_quantize(kind: str) -> None:
    rows = bell(6, 96)
    expected = gguf.quantize(rows.numpy(), gguf.GGMLQuantizationType[kind])
    assert encode(kind, rows) == expected.tobytes()
