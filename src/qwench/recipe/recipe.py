"""The recipe itself, and what has to hold between its steps."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from qwench.recipe.rules import Strict
from qwench.recipe.steps import Calibration, Correct, Export, Quantize, Smooth, Step, default_calibration, reads_rows


class Recipe(Strict):
    """A release, described.

    Attributes:
        name: its short name; release folders and cards use it.
        about: one line for lists.
        steps: what is done, in order; `export` comes last, once.
        calibration: the rows that its steps read; None where none of them reads any.
    """

    name: str
    about: str = ""
    steps: tuple[Step, ...] = Field(min_length=1)
    calibration: Calibration | None = Field(default_factory=lambda data: default_calibration(data.get("steps", ())))

    @model_validator(mode="after")
    def _export_last(self) -> Recipe:
        if [bool(s.export) for s in self.steps].count(True) != 1 or not self.steps[-1].export:
            raise ValueError("a recipe ends with exactly one export step")
        return self

    @model_validator(mode="after")
    def _in_order(self) -> Recipe:
        kinds = [next(name for name in type(s).model_fields if getattr(s, name)) for s in self.steps]
        order = list(Step.model_fields)
        if kinds != sorted(kinds, key=order.index) or any(kinds.count(kind) > 1 for kind in kinds):
            raise ValueError(f"steps come once each and in this order: {', '.join(order)}")
        if "quantize" not in kinds and len(kinds) > 1:
            raise ValueError("smooth and correct need a quantize step between them")
        return self

    @model_validator(mode="after")
    def _rows_are_read(self) -> Recipe:
        if self.calibration and not self.calibrated:
            raise ValueError("calibration is given, and no step reads it: take it out, or name a method other than rtn")
        if self.calibrated and not self.calibration:
            raise ValueError("a step reads calibration rows: leave calibration out for the default, or describe it")
        return self

    @property
    def smooth(self) -> Smooth | None:
        return next((s.smooth for s in self.steps if s.smooth), None)

    @property
    def quantize(self) -> Quantize | None:
        return next((s.quantize for s in self.steps if s.quantize), None)

    @property
    def correct(self) -> Correct | None:
        return next((s.correct for s in self.steps if s.correct), None)

    @property
    def calibrated(self) -> bool:
        """Whether it reads calibration rows."""
        return any(reads_rows(step) for step in self.steps)

    @property
    def export(self) -> Export:
        export = self.steps[-1].export
        assert export is not None
        return export


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, defaults filled in: what fingerprints and records hold."""
    return recipe.model_dump(mode="json", exclude_none=True)
