"""REAP: which experts of a mixture matter. Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression" (arXiv:2510.13999).

An expert adds g_j(x) * f_j(x) to the output of its layer: its router weight times its own output. So the saliency of expert j is the mean, over
the tokens that were sent to it, of g_j(x) * ||f_j(x)||_2. What is rarely used but large when used survives; a mean by number of tokens
does not punish rarity, which `frequency` would.

g is the weight that the layer really multiplies by: in Qwen3.5 the softmax over all experts, renormalised over the chosen ones. Saliency from the
weights before that (`renormalised` makes the step) ranks experts by something that the network never does.

Everything here is sums over tokens: they add up over rows, devices and machines in any order, in float64.

    sums = observe(weights_TK, indices_TK, norms_TK, experts=256) + observe(...)
    kept = keep(sums.saliency("reap"), 128, top_k=8)

Letters in names: T tokens, K chosen experts of a token, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Criterion = Literal["reap", "frequency", "weight_sum", "norm_mean", "norm_sum", "contribution_sum", "norm_max"]
"""How experts are ranked. g: router weight, n: norm of the expert's own output, over the tokens sent to it.

`reap`: mean of g * n. `frequency`: number of tokens. `weight_sum`: sum of g. `norm_mean`, `norm_sum`, `norm_max`: of n. `contribution_sum`: sum of
g * n. The last six are what the paper compares with (its code calls some of them weighted frequency and expert activation norm, EAN)."""


@dataclass(frozen=True)
class SaliencySums:
    """Sums over the tokens that were sent to each expert of one layer; every tensor is [experts].

    Attributes:
        tokens: int64, how many.
        weight: float64, of their router weights.
        norm: float64, of the L2 norms of the expert's outputs.
        contribution: float64, of router weight times norm.
        largest_norm: float64, the largest norm; 0 where there was no token.
    """

    tokens: Tensor
    weight: Tensor
    norm: Tensor
    contribution: Tensor
    largest_norm: Tensor

    @classmethod
    def zero(cls, experts: int) -> SaliencySums:
        """Sums over no token."""
        real = [torch.zeros(experts, dtype=torch.float64) for _ in range(4)]
        return cls(torch.zeros(experts, dtype=torch.int64), *real)

    def __add__(self, other: SaliencySums) -> SaliencySums:
        """Sums over the tokens of both."""
        return SaliencySums(
            self.tokens + other.tokens,
            self.weight + other.weight,
            self.norm + other.norm,
            self.contribution + other.contribution,
            torch.maximum(self.largest_norm, other.largest_norm),
        )

    def saliency(self, criterion: Criterion = "reap") -> Tensor:
        """How much each expert matters, float64 [experts], larger is more. Experts that saw no token score 0."""
        assert criterion in get_args(Criterion), criterion
        seen = self.tokens.clamp(min=1)
        table = {
            "reap": self.contribution / seen,
            "frequency": self.tokens.to(torch.float64),
            "weight_sum": self.weight,
            "norm_mean": self.norm / seen,
            "norm_sum": self.norm,
            "contribution_sum": self.contribution,
            "norm_max": self.largest_norm,
        }
        return table[criterion]

    @property
    def never_hit(self) -> list[int]:
        """Experts that no token was sent to: nothing is known of them, and the report has to say so."""
        return [int(expert) for expert in torch.nonzero(self.tokens == 0)]


def renormalised(probabilities_TK: Tensor) -> Tensor:
    """Router weights of the chosen experts that sum to 1 for each token, as the layers of Qwen3.5 use them."""
    return probabilities_TK / probabilities_TK.sum(-1, keepdim=True)


def observe(weights_TK: Tensor, indices_TK: Tensor, norms_TK: Tensor, experts: int) -> SaliencySums:
    """Sums over some tokens.

    Args:
        weights_TK: router weights that the layer multiplies by, see `renormalised`.
        indices_TK: which experts they belong to, 0..experts-1, no expert twice for one token.
        norms_TK: L2 norms of these experts' own outputs, before any weighting.
        experts: how many the layer has.
    """
    expert = indices_TK.reshape(-1).to("cpu", torch.int64)
    weight = weights_TK.reshape(-1).to("cpu", torch.float64)
    norm = norms_TK.reshape(-1).to("cpu", torch.float64)
    assert len(expert) == len(weight) == len(norm), (indices_TK.shape, weights_TK.shape, norms_TK.shape)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(experts, dtype=torch.float64).index_add_(0, expert, values)

    # NaN passes through amax and through the sums: `keep` refuses it and names the expert.
    largest = torch.zeros(experts, dtype=torch.float64).scatter_reduce_(0, expert, norm, "amax")
    return SaliencySums(torch.bincount(expert, minlength=experts), total(weight), total(norm), total(weight * norm), largest)


def observe_expert(expert: int, weights_T: Tensor, outputs_TD: Tensor, experts: int) -> SaliencySums:
    """Sums over the tokens of one expert, as a layer works through them.

    Args:
        weights_T: router weights of these tokens for this expert.
        outputs_TD: the expert's own outputs for them, unweighted.
    """
    norms = torch.linalg.vector_norm(outputs_TD, dim=-1, dtype=torch.float32)
    return observe(weights_T, torch.full(norms.shape, expert), norms, experts)


def keep_complaint(saliency: Tensor, count: int, top_k: int) -> str | None:
    """Why `count` experts cannot be kept by this saliency [experts], or None. `top_k` is how many a token is sent to."""
    experts = len(saliency)
    if count < top_k:
        return f"{count} experts are to be kept, but the router sends every token to {top_k}"
    if count > experts:
        return f"{count} experts are to be kept, the layer has {experts}"
    broken = [int(e) for e in torch.nonzero(~torch.isfinite(saliency))]
    if broken:
        return f"the saliency of experts {broken} of {experts} is not finite: calibration produced NaN or infinity"
    return None


def keep(saliency: Tensor, count: int, top_k: int) -> list[int]:
    """The `count` experts of highest saliency, in ascending order of their numbers; of equals the lower number stays.

    The caller asks `keep_complaint` first.
    """
    assert (wrong := keep_complaint(saliency, count, top_k)) is None, wrong
    order = torch.sort(saliency, descending=True, stable=True).indices
    return sorted(order[:count].tolist())
