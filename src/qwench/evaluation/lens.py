"""KL(source || release) as if the network ended after each layer: where a release comes apart.

A logit lens: hidden states after a decoder layer go through the model's own final norm and output head, and what comes out is taken for a distribution of the next token (nostalgebraist,
"interpreting GPT: the logit lens", 2020). Both models are read so, each through its own norm and head; after the last layer it is the divergence itself.

It is read at some positions only, evenly spaced over all that are scored. The head goes through once for each layer, a part of the vocabulary at a time, so that no [positions, vocabulary] is ever held;
with s and r the logits of source and release, m the largest of a model's logits seen so far, every part adds to

    Z_s = sum_v exp(s_v - m_s)      Z_r = sum_v exp(r_v - m_r)      A = sum_v exp(s_v - m_s) (s_v - r_v)

and at the end KL = A / Z_s - (m_s + log Z_s) + (m_r + log Z_r). All of it is float64: the two logarithms cancel to what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

POSITIONS = 256
"""Positions that are read through the head after every layer: 64 layers of them cost as much of the head as 8 rows of 2048 tokens do."""

LogitParts = Callable[[Tensor], Iterable[tuple[slice, Tensor]]]
"""Normed hidden states [positions, hidden] to logits, a part of the vocabulary at a time: (its tokens, [positions, tokens]); `Trunk.logit_parts` is one."""


def lens_positions(rows: int, length: int, count: int = POSITIONS) -> Tensor:
    """int64 [positions]: which of the positions of `rows` rows of `length` tokens, counted row by row, are read: `count` of them, evenly spaced over all but the last of each row, or all where
    there are fewer."""
    scored = rows * (length - 1)
    chosen = torch.arange(min(count, scored), dtype=torch.float64)
    place = ((chosen + 0.5) * (scored / max(len(chosen), 1))).floor().to(torch.int64)
    return place + place.div(length - 1, rounding_mode="floor")  # the last position of every row before it is passed over


@torch.no_grad()
def divergence_by_layer(source_LPD: Tensor, release_LPD: Tensor, source: LogitParts, release: LogitParts) -> Tensor:
    """float64 [layers, positions], nats, on the processor.

    Args:
        source_LPD, release_LPD: each model's hidden states after each layer, at the same positions, after its final norm.
        source, release: each model's head.
    """
    pairs = zip(source_LPD, release_LPD, strict=True)
    return torch.stack([divergence_of_parts(source(one), release(other)) for one, other in pairs])


@torch.no_grad()
def divergence_of_parts(source: Iterable[tuple[slice, Tensor]], release: Iterable[tuple[slice, Tensor]]) -> Tensor:
    """KL(source || release) at some positions, float64 [positions], from logits in parts of the vocabulary that are the same for both."""
    sums: _Sums | None = None
    for (tokens, source_PV), (others, release_PV) in zip(source, release, strict=True):
        assert tokens == others, f"parts of the vocabulary {tokens} and {others}"
        sums = sums or _Sums(source_PV)
        sums.add(source_PV.double(), release_PV.double())
    assert sums is not None, "no logits"
    return sums.divergence().clamp_min_(0).cpu()


class _Sums:
    """What the parts seen so far add up to; see the module's formula."""

    def __init__(self, like_PV: Tensor) -> None:
        nothing = torch.zeros(len(like_PV), dtype=torch.float64, device=like_PV.device)
        self.most_s, self.most_r = nothing - torch.inf, nothing - torch.inf
        self.mass_s, self.mass_r, self.apart = nothing, nothing.clone(), nothing.clone()

    def add(self, source_PV: Tensor, release_PV: Tensor) -> None:
        most_s = torch.maximum(self.most_s, source_PV.amax(-1))
        most_r = torch.maximum(self.most_r, release_PV.amax(-1))
        weight_PV = (source_PV - most_s[:, None]).exp()
        shrunk = (self.most_s - most_s).exp()
        self.mass_s = self.mass_s * shrunk + weight_PV.sum(-1)
        self.apart = self.apart * shrunk + (weight_PV * (source_PV - release_PV)).sum(-1)
        self.mass_r = self.mass_r * (self.most_r - most_r).exp() + (release_PV - most_r[:, None]).exp().sum(-1)
        self.most_s, self.most_r = most_s, most_r

    def divergence(self) -> Tensor:
        return self.apart / self.mass_s - (self.most_s + self.mass_s.log()) + (self.most_r + self.mass_r.log())
