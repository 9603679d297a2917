"""What a recipe says about experts that a release does without."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from qwench.recipe.rules import Strict

Criterion = Literal[
    "reap", "frequency", "weight_sum", "norm_mean", "norm_sum", "contribution_sum", "norm_max", "random"
]  # fmt: skip
"""How experts are ranked: those of `methods.reap`, and none at all."""


class Prune(Strict):
    """Leave out routed experts, equally many in every layer, the MTP head's among them: engines build all layers with one `num_experts`.

    Attributes:
        ratio: share of the experts that goes, above 0 and below 1; rounded down to whole experts.
        experts: or how many stay.
        criterion: who stays. `reap`: mean of router weight times norm of the expert's output, over the tokens that were sent to it. `frequency`: number of tokens.
            `weight_sum`: of the router's weights. `norm_mean`, `norm_sum`, `norm_max`: of the outputs' norms. `contribution_sum`: weight times norm. `random`.
        seed: of `random`.
        least_tokens: an expert that fewer tokens reached is named in the record, for nobody knows what it is good for.
        repair: `least-squares`: the down projections of the shared expert and of those that stay are changed, layer by layer, so that together they add what all experts did; each
            change is taken only where it lowers the error on rows that it was not fitted on. `none`.
    """

    ratio: float | None = None
    experts: int | None = Field(None, ge=1)
    criterion: Criterion = "reap"
    seed: int = 0
    least_tokens: int = Field(128, ge=1)
    repair: Literal["none", "least-squares"] = "none"

    @field_validator("ratio")
    @classmethod
    def _inside(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError(f"{value:g} of the experts would go: a ratio lies above 0 and below 1, 0.5 is half of them")
        return value

    @model_validator(mode="after")
    def _one_number(self) -> Prune:
        if (self.ratio is None) == (self.experts is None):
            raise ValueError("say either ratio, the share of experts that goes, or experts, the number that stays")
        return self

    def kept(self, experts: int) -> int:
        """How many of a layer's experts stay."""
        if self.experts is not None:
            return self.experts
        assert self.ratio is not None
        return experts - int(experts * self.ratio + 1e-9)  # 0.29 of 100 is 29, whatever a float makes of it
