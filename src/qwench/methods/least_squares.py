"""The change of a linear layer's weight that makes up best for something that is missing in its output.

    min_C  sum_x || r(x) - C h(x) ||^2 + pull * mean(diag(H)) * ||C||^2,    H = sum_x h h^T        =>      C = (sum_x r h^T) (H + pull * mean(diag(H)) * 1)^-1

h is what the layer reads, r what is missing. The pull towards no change keeps directions that few tokens show from being trusted.

Letters in names: n tokens, I input channels, D output channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

PULL = 0.1


def correction(read_nI: Tensor, missing_nD: Tensor, pull: float = PULL) -> Tensor:
    """What is to be added to the weight, [D, I], in the dtype of what is read; zeros where nothing is read."""
    second = (read_nI.T @ read_nI).double()
    size = float(second.diagonal().mean()) if len(read_nI) else 0.0
    if not size > 0:
        return missing_nD.new_zeros(missing_nD.shape[1], read_nI.shape[1])
    matched = (missing_nD.T @ read_nI).double()
    pulled = second + pull * size * torch.eye(len(second), dtype=second.dtype, device=second.device)
    found: Tensor = torch.linalg.solve(pulled, matched.T).T
    return found.to(read_nI.dtype)
