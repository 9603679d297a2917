"""Rows of Gated DeltaNet cut into chunks of positions, and what goes on between the positions of a chunk (see `chunked_delta` for what it is good for).

Heads of queries and keys that several value heads share are not repeated: what belongs to them lies side by side in the last dimension.

Letters in names: B rows, T positions, N chunks, C positions of a chunk, H heads of queries and keys, E value heads (R for each of H), K and V their widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 32
"""Positions of a chunk: fewer mean more steps one after the other, more mean more pairs."""
INNER = 8
"""Positions that a system is solved for one by one; larger ones are put together of these."""
EPSILON = 1e-6
"""Under the square root of a length, as in the classes of transformers."""


@dataclass(frozen=True)
class Chunks:
    """Rows cut into chunks, float32. The first dimension is rows times heads.

    Attributes:
        shape: B, T, H, R, N, C.
        query_BH, key_BH: [B*H, N, C, K], of unit length, the query over the root of K.
        length_query, length_key: one over their lengths before, [B*H, N, C, 1].
        value: [B*E, N, C, V].
        beta, grown, rest: [B*E, N, C, 1]: beta; exp(G): the decay since the chunk began; exp(G_C - G): that until it ends.
        whole: [B*H, N, 1, R, 1], the decay of a chunk.
        decay: [B*E, N, C, C], of pairs; 0 above the diagonal.
    """

    shape: tuple[int, int, int, int, int, int]
    query_BH: Tensor
    key_BH: Tensor
    length_query: Tensor
    length_key: Tensor
    value: Tensor
    beta: Tensor
    grown: Tensor
    rest: Tensor
    whole: Tensor
    decay: Tensor

    def shared(self, x: Tensor) -> Tensor:
        """[B*E, ...] -> [B*H, R, ...]."""
        return x.reshape(-1, self.shape[3], *x.shape[1:])

    def by_value_head(self, x: Tensor) -> Tensor:
        """[B*H, ..., M, R*V] -> [B*E, ..., M, V]."""
        return x.reshape(*x.shape[:-1], self.shape[3], -1).movedim(-2, 1).flatten(0, 1)

    def by_key_head(self, x: Tensor) -> Tensor:
        """[B*E, ..., M, V] -> [B*H, ..., M, R*V]."""
        return self.shared(x).movedim(1, -2).flatten(-2)

    def pairs(self, left_BH: Tensor) -> Tensor:
        """left_i . k_j of every value head, decayed: [B*E, N, C, C]."""
        products = left_BH @ self.key_BH.transpose(-1, -2)
        return (self.shared(self.decay) * products.unsqueeze(1)).flatten(0, 1)

    def summed(self, pairs: Tensor) -> Tensor:
        """Over the value heads that share a key, decayed: [B*E, N, C, C] -> [B*H, N, C, C]."""
        return self.shared(pairs * self.decay).sum(1)


def cut_into_chunks(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Chunks:
    rows, length, heads, width = key.shape
    share, count = value.shape[2] // heads, -(-length // CHUNK)
    shape = rows, length, heads, share, count, CHUNK
    query, key, value = (cut(x, shape) for x in (query, key, value))
    beta, total = cut(beta.unsqueeze(-1), shape), cut(g.unsqueeze(-1), shape).cumsum(2)
    length_query, length_key = (x.square().sum(-1, keepdim=True).add_(EPSILON).rsqrt_() for x in (query, key))
    above = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=value.device).triu_(1)
    decay = (total - total.transpose(-1, -2)).masked_fill_(above, float("-inf")).exp_()
    return Chunks(
        shape, query * (length_query * width**-0.5), key * length_key, length_query, length_key, value, beta, total.exp(),
        (total[:, :, -1:] - total).exp_(), total[:, :, -1:].exp().view(rows * heads, share, count, 1, 1).movedim(1, 3), decay,
    )  # fmt: skip


def cut(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[B, T, heads, width] -> [B*heads, N, C, width], zeros behind the end."""
    rows, length, _, _, count, size = shape
    x = F.pad(x, (0, 0, 0, 0, 0, count * size - length)) if count * size > length else x
    return x.to(torch.float32).view(rows, count, size, *x.shape[2:]).movedim(3, 1).flatten(0, 1).contiguous()


def joined(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The way back: [B*heads, N, C, width] -> [B, T, heads, width]."""
    rows, length = shape[:2]
    return x.reshape(rows, -1, *x.shape[1:]).movedim(1, 3).flatten(1, 2)[:, :length]


def solved(lower: Tensor) -> Tensor:
    """(I + lower)^-1 for strictly lower triangles [M, N, C, C], C a power of 2 times `INNER`.

    Blocks on the diagonal row by row, then pairs of blocks: the inverse of [[a, 0], [c, b]] is [[a', 0], [-b' c a', b']].
    """
    size, block = lower.shape[-1], INNER
    cut = [lower[..., at : at + block, at : at + block] for at in range(0, size, block)]
    diagonal = torch.stack(cut, 2)
    inverse = torch.eye(block, device=lower.device).expand_as(diagonal).clone()
    for row in range(1, block):
        inverse[..., row : row + 1, :row] = -(diagonal[..., row : row + 1, :row] @ inverse[..., :row, :row])
    while block < size:
        first, second = inverse[:, :, 0::2], inverse[:, :, 1::2]
        below = torch.stack([lower[..., at + block : at + 2 * block, at : at + block] for at in range(0, size, 2 * block)], 2)
        inverse = inverse.new_zeros(*first.shape[:3], 2 * block, 2 * block)
        inverse[..., :block, :block], inverse[..., block:, block:] = first, second
        inverse[..., block:, :block] = -(second @ below @ first)
        block *= 2
    return inverse.squeeze(2)


def decayed(state: Tensor, whole: Tensor) -> Tensor:
    """States [B*H, K, R*V] times the decay of a chunk, [B*H, 1, R, 1]."""
    return (state.view(*state.shape[:-1], whole.shape[2], -1) * whole).flatten(-2)
