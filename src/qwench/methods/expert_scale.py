"""Make up for experts that are gone with one factor for each that stays, by least squares.

Without the others, tokens go to experts that were not their first choice, with weights that sum to 1 all the same. What a mixture adds to a token is then
sum_j s_j g_j f_j(x), with factors s = 1. The s that come nearest to what the whole mixture added, y(x), solve

    min_s  sum_x || y(x) - sum_j s_j c_j(x) ||^2,   c_j = g_j f_j(x)      =>      A s = b,   A_ij = sum_x <c_i, c_j>,  b_j = sum_x <c_j, y>

with a little of A's diagonal that pulls them towards 1. Factors go into the experts' down projections, so nothing else has to know of them. The error that any factors leave on some
tokens follows from A, b and sum ||y||^2 of these tokens, held-out ones too.

Letters in names: n tokens, K experts that a token is sent to, E experts that stay, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PULL = 0.01
"""Share of A's diagonal that pulls each factor towards 1."""


@dataclass
class ScaleSums:
    """Sums over tokens; they add up over rows, devices and machines. All float64.

    Attributes:
        products: A, [E, E].
        matches: b, [E].
        energy: sum of || y ||^2.
    """

    products: Tensor
    matches: Tensor
    energy: float = 0.0

    @classmethod
    def zero(cls, experts: int) -> ScaleSums:
        """Sums over no token."""
        return cls(torch.zeros(experts, experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64))

    def add(self, chosen_nK: Tensor, contributions_nKD: Tensor, wanted_nD: Tensor) -> None:
        """Take in more tokens.

        Args:
            chosen_nK: experts that they are sent to, no expert twice for a token.
            contributions_nKD: router weight times output of each of them.
            wanted_nD: what the whole mixture adds to them.
        """
        experts = len(self.matches)
        pairs = (chosen_nK[:, :, None] * experts + chosen_nK[:, None, :]).flatten().cpu()
        inner = (contributions_nKD @ contributions_nKD.transpose(1, 2)).flatten().cpu().double()
        self.products += torch.zeros(experts * experts, dtype=torch.float64).index_add_(0, pairs, inner).view(experts, experts)
        along = (contributions_nKD * wanted_nD[:, None]).sum(-1)
        self.matches.index_add_(0, chosen_nK.flatten().cpu(), along.flatten().cpu().double())
        self.energy += float(wanted_nD.double().square().sum())

    def factors(self) -> Tensor:
        """The factors that leave the least error on these tokens, [E]; 1 for an expert that none of them is sent to."""
        diagonal = self.products.diagonal()
        pull = torch.where(diagonal > 0, PULL * diagonal, torch.ones_like(diagonal))
        found: Tensor = torch.linalg.solve(self.products + pull.diag(), self.matches + pull)
        return found

    def error(self, factors: Tensor) -> float:
        """Relative squared error that factors [E] leave on these tokens."""
        left = self.energy - 2 * float(factors @ self.matches) + float(factors @ self.products @ factors)
        return left / self.energy if self.energy else 0.0
