"""From logits to a token, and from a draft to a token of the right distribution.

Speculative sampling (Leviathan, Kalman and Matias, Fast Inference from Transformers via Speculative Decoding, 2023): a draft x, drawn from the drafter's distribution q,
is accepted with probability min(1, p(x) / q(x)), where p is the model's own. Where it is refused, the token is drawn from what p has more than q,
norm(max(p - q, 0)). What comes out has exactly the distribution p, whatever q is: q decides how often, never what.

Greedy decoding is the same rule at temperature 0: p and q are each one token, and a draft is accepted where they agree.

Temperature, top-k and top-p are applied to p and q alike, in this order. p and q are float64: refusing 1 - p/q of the time should not hang on the
rounding of a softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.errors import CheckpointError, UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 chooses the most likely token (of several, the first).
        top_k: only so many of the most likely tokens; 0 for all. Tokens that tie with the last of them stay.
        top_p: only the fewest most likely tokens that together have at least this probability.

    Raises:
        UserError: a number out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf") and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UserError(
                f"cannot sample with temperature {self.temperature}, top_k {self.top_k} and top_p {self.top_p}",
                "temperature and top_k are 0 or more, top_p is over 0 and at most 1",
            )

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities of the next token, float64 [..., V], in main memory, where chance is; of logits [..., V] from anywhere. Raises
        CheckpointError where these are not finite."""
        if not bool(logits.isfinite().all()):
            raise CheckpointError("logits are not finite", "check the checkpoint: evaluation names the layer where it begins")
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits, dtype=torch.float64).scatter(-1, best, 1.0).cpu()
        scaled = logits.cpu().double() / self.temperature
        if 0 < self.top_k < scaled.shape[-1]:
            scaled = scaled.masked_fill(scaled < scaled.topk(self.top_k).values[..., -1:], float("-inf"))
        return nucleus(scaled.softmax(-1), self.top_p)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [..., V] of the fewest most likely tokens that together reach `top_p`, scaled to sum to 1; the others are 0."""
    if top_p == 1:
        return probabilities
    ordered, tokens = probabilities.sort(stable=True, dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probabilities).scatter(-1, tokens, ordered.masked_fill(before >= top_p, 0.0))
    return kept / kept.sum(-1, keepdim=True)


def draw(probabilities_V: Tensor, generator: torch.Generator) -> int:
    """One token."""
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def judge(model: Tensor, drafter: Tensor, drafted: Sequence[int], generator: torch.Generator) -> tuple[int, int]:
    """Accept drafts in order up to the first that is refused, and choose the token after the last accepted one.

    Args:
        model: the model's distribution p at the place of each draft, and at the one after the last: float64 [K + 1, V].
        drafter: the distributions q that the drafts were drawn from, [K, V].
        drafted: the K drafts.
        generator: source of chance.

    Returns:
        How many drafts are accepted, and the token that comes after them: of the residual where a draft was refused, of p (the bonus) where none was.
    """
    assert len(model) == len(drafter) + 1 == len(drafted) + 1
    for place, token in enumerate(drafted):
        p, q = model[place], drafter[place]
        chance = float(torch.rand((), dtype=torch.float64, generator=generator))
        if chance * float(q[token]) >= float(p[token]):  # u < p/q accepts; q(token) is not 0, or it would not have been drawn
            return place, draw(residual(p, q), generator)
    return len(drafted), draw(model[-1], generator)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What p has more than q, not scaled to sum to 1; p itself where rounding left nothing (a refusal is then a rounding error too)."""
    more = (p - q).clamp_min(0)
    return more if bool(more.sum() > 0) else p
