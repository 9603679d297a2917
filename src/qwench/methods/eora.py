"""EoRA: what quantization lost, given back by a matrix of low rank that stands beside the quantized one.

Liu et al. 2024, arXiv:2410.21271. The correction B A of rank r that gives back most of the output is not the best approximation of the error
E = W - Wq itself but of E as the inputs see it: with second moment H = sum x x^T it minimizes tr((E - B A) H (E - B A)^T). The paper rotates
and stretches E by the eigenvectors and roots of the eigenvalues of H, truncates the singular value decomposition of the result, and divides
by the roots again. What comes out can be had without roots, and so without the question of which tiny eigenvalues not to divide by: with U
[out, r] the leading eigenvectors of E H E^T,

    B A = U U^T E,    so B = U, A = U^T E

Where H has full rank that is the paper's result; where it has not, it is the same on all inputs that H knows of, and on the others U U^T E
takes off a part of the error too, while the paper leaves all of it.

Small problems are solved exactly, in float64. For large ones, U spans a block Krylov space (Musco & Musco 2015, arXiv:1504.05477): E H E^T is
applied a few times to random vectors, and the best r directions in the span of all that came by are taken. The spectrum of a rounding error
is flat, which makes its single eigenvectors hard to find but their sum easy: the loss comes out within a thousandth of the exact one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwench.numerics import Quantized

EXACT_UP_TO = 1024
"""Smaller side of a matrix up to which the eigenvectors are computed exactly."""
OVERSAMPLED = 16
"""Vectors in a Krylov block beyond the rank."""
STEPS = 6
"""Times that E H E^T is applied."""
COMPARED_ROWS = 1024
"""Rows that losses are measured on, about: on all of them it would take longer than the correction."""


@dataclass(frozen=True)
class EoraReport:
    """What a correction gives back: squared output errors per token, tr(E H E^T) / tokens, summed over `compared_rows` rows.

    Attributes:
        rank: of the correction: at most what was asked for, and at most the smaller side of the matrix.
        loss_before: of the quantized matrix alone.
        loss: with the correction, as its factors are stored.
        compared_rows: rows that the losses are of, evenly spread; all of them in a small matrix.
        fallback: why the inputs were taken to be all alike (H = 1: the correction is the best one of E itself); None where they were not.
    """

    rank: int
    loss_before: float
    loss: float
    compared_rows: int
    fallback: str | None = None

    @property
    def relative(self) -> float:
        """What is left, as a share; 0 where nothing was lost in the first place."""
        return self.loss / self.loss_before if self.loss_before > 0 else 0.0


def eora(
    weight: Tensor, quantized: Quantized, second: Tensor, tokens: int, rank: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Quantized, EoraReport]:
    """Adds the low-rank correction to a quantized matrix.

    Args:
        weight: [out, in], what was quantized, any floating dtype.
        quantized: the result; an earlier `low_rank` is replaced.
        second: sum over tokens of x x^T, [in, in], float32 or float64; what GPTQ was given. All arithmetic is done on its device.
        tokens: how many were summed.
        rank: at most; 1 or more.
        dtype: of the factors.

    Returns:
        `quantized` with `low_rank` = (A [r, in], B [out, r]), on the processor, and what the correction gives back. A component of A and its
        counterpart in B are of equal length, so that neither leaves the range of a short dtype.
    """
    assert rank >= 1 and weight.shape == quantized.codes.shape and weight.shape[1] == len(second)
    error_OI = (weight.float().cpu() - quantized.dequantize()).to(second.device)
    fallback = None if _usable(second) and tokens > 0 else f"the second moment of {tokens} tokens is zero or not finite"
    if fallback:
        second, tokens = torch.eye(len(second), device=second.device), 1
    right_RI, left_OR = _stored(error_OI, *correction(error_OI, second, rank), dtype)
    some = slice(None, None, max(1, len(error_OI) // COMPARED_ROWS))
    before_OI, after_OI = error_OI[some], error_OI[some] - left_OR[some].float() @ right_RI.float()
    losses = _loss(before_OI, second, tokens), _loss(after_OI, second, tokens)
    return replace(quantized, low_rank=(right_RI.cpu(), left_OR.cpu())), EoraReport(
        len(right_RI), *losses, len(before_OI), fallback
    )


def correction(error_OI: Tensor, second_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [out, r] with orthonormal columns, and U^T E [r, in], float32: U U^T E is the best correction of rank r.

    `rank` is capped at the smaller side of the matrix.
    """
    rank = min(rank, *error_OI.shape)
    if min(error_OI.shape) <= EXACT_UP_TO or min(error_OI.shape) < (STEPS + 1) * (rank + OVERSAMPLED):
        left_OR = _leading_exactly(error_OI, second_II, rank)
    else:
        left_OR = _leading(error_OI, second_II, rank)
    return left_OR, left_OR.T @ error_OI


def _leading_exactly(error_OI: Tensor, second_II: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of E H E^T [out, r]. A tall E is turned into a square one first: E = Q R, and U = Q times those of R H R^T."""
    error_OI = error_OI.double()
    outputs, inputs = error_OI.shape
    basis = None
    if outputs > inputs:
        basis, error_OI = torch.linalg.qr(error_OI)
    vectors = _largest(error_OI @ second_II.double() @ error_OI.T, rank)
    if basis is not None:
        vectors = basis @ vectors
    return vectors.float()


def _leading(error_OI: Tensor, second_II: Tensor, rank: int) -> Tensor:
    """Nearly the leading eigenvectors of E H E^T [out, r], from a block Krylov space."""
    # Products stay near the size of E: float32 is enough.
    second_II = (second_II / torch.diagonal(second_II).mean()).to(error_OI.dtype)
    generator = torch.Generator().manual_seed(0)
    start_IK = torch.randn(error_OI.shape[1], rank + OVERSAMPLED, generator=generator).to(error_OI)
    block_OK = torch.linalg.qr(error_OI @ (second_II @ start_IK))[0]
    blocks = [block_OK]
    for _ in range(STEPS - 1):
        block_OK = torch.linalg.qr(error_OI @ (second_II @ (error_OI.T @ block_OK)))[0]
        blocks.append(block_OK)
    basis_OK = torch.linalg.qr(torch.cat(blocks, 1))[0]
    seen_KI = basis_OK.T @ error_OI
    leading_KR = _largest(((seen_KI @ second_II) @ seen_KI.T).double(), rank)
    return torch.matmul(basis_OK, leading_KR.to(basis_OK))


def _largest(symmetric: Tensor, count: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, largest first."""
    vectors: Tensor = torch.linalg.eigh(symmetric)[1]
    return vectors[:, -count:].flip(1)


def _stored(error_OI: Tensor, left_OR: Tensor, right_RI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A, B) in the dtype of storage. B is rounded first, then A is fitted to what became of it: the least squares solution of B A = E."""
    length_R = torch.linalg.vector_norm(right_RI, dim=1).sqrt()
    left_OR = (left_OR * length_R).to(dtype)
    exact_OR = left_OR.double()
    gram_RR = exact_OR.T @ exact_OR
    # A component without length has a zero column in B: its row of A is zero whatever stands on the diagonal.
    gram_RR.diagonal().add_((gram_RR.diagonal() == 0).double())
    return torch.linalg.solve(gram_RR, exact_OR.T @ error_OI.double()).to(dtype), left_OR


def _usable(second_II: Tensor) -> bool:
    # A sum is finite only if all of its terms are.
    return float(torch.diagonal(second_II).sum()) > 0 and bool(second_II.sum(dtype=torch.float64).isfinite())


def _loss(error_OI: Tensor, second_II: Tensor, tokens: int) -> float:
    error_OI = error_OI.to(second_II.dtype)
    return float((error_OI @ second_II).mul_(error_OI).sum(dtype=torch.float64)) / tokens
