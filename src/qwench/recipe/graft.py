"""What a recipe says about parts that come from another checkpoint, and about the MTP head that a release must still have when it is done."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from qwench.recipe.rules import Strict


class Graft(Strict):
    """Take components bit for bit from a donor into a checkpoint that lost them.

    Attributes:
        components: `mtp`, `vision`.
        donor: a folder or a hub id, usually the base that the checkpoint was tuned from; left to the command line (`--donor`) where it is None.
        replace: also where the checkpoint still has some of it.
    """

    components: tuple[Literal["mtp", "vision"], ...] = Field(("mtp",), min_length=1)
    donor: str | None = Field(None, min_length=1)
    replace: bool = False

    @field_validator("components")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a component is named twice")
        return value


class AcceptanceGate(Strict):
    """How much of its acceptance an MTP head may lose on the way into a release.

    Attributes:
        floor: share of the source's acceptance at draft position 1 that the release must reach.
        documents, length: held-out rows that both are measured on, and tokens in each.
    """

    floor: float = Field(0.5, ge=0, le=1)
    documents: int = Field(8, ge=2)
    length: int = Field(256, ge=8)
