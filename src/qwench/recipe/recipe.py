"""The recipe itself, and what has to hold between its steps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from qwench.errors import RecipeError
from qwench.recipe.gguf import ExportGguf
from qwench.recipe.graft import AcceptanceGate, Graft
from qwench.recipe.prune import Prune
from qwench.recipe.rules import Strict
from qwench.recipe.steps import (
    Calibration,
    Correct,
    Export,
    Quantize,
    Smooth,
    Step,
    default_calibration,
    gathers_by_expert,
    reads_rows,
)


class Recipe(Strict):
    """A release, described.

    Attributes:
        name: its short name; release folders and cards use it.
        about: one line for lists.
        steps: what is done, in order; `export` comes last, once.
        calibration: the rows that its steps read; None where none of them reads any.
        acceptance: how much acceptance an MTP head may lose before the run refuses to finish; `off` where nobody is to look.
    """

    name: str
    about: str = ""
    steps: tuple[Step, ...] = Field(min_length=1)
    calibration: Calibration | None = Field(default_factory=lambda data: default_calibration(data.get("steps", ())))
    acceptance: AcceptanceGate | Literal["off"] = AcceptanceGate()

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
        if "quantize" not in kinds and {"smooth", "correct"} & set(kinds):
            raise ValueError("smooth and correct need a quantize step between them")
        return self

    @model_validator(mode="after")
    def _gguf_quantizes_itself(self) -> Recipe:
        others = [name for name in ("smooth", "quantize", "correct") if getattr(self, name)]
        if self.gguf and self.prune:
            raise ValueError(
                "prune first, into a release of its own (a recipe with prune and export), and make GGUF files of that"
            )
        if self.gguf and others:
            raise ValueError(
                f"a gguf export chooses its own number formats, and {', '.join(others)} would not reach them: take "
                f"{'it' if len(others) == 1 else 'them'} out; types are in `types` and `overrides` of the export"
            )
        return self

    @model_validator(mode="after")
    def _rows_are_read(self) -> Recipe:
        if self.calibration and not self.calibrated:
            raise ValueError(
                "calibration is given, and no step reads it: take it out, or name a method other than rtn or a scheme with 4-bit activations"
            )
        if self.calibration and self.calibration.experts == "all" and not any(gathers_by_expert(step) for step in self.steps):
            raise ValueError(
                "calibration says experts: all, and no step gathers statistics of what experts read: pruning ranks by the tokens that are sent to them; take it out, or name smooth, "
                "gptq, autoround (from gptq), correct or a scheme with 4-bit activations"
            )
        if self.calibrated and not self.calibration:
            raise ValueError("a step reads calibration rows: leave calibration out for the default, or describe it")
        return self

    def calibrated_on(self, text: str | None = None, samples: int | None = None, length: int | None = None) -> Recipe:
        """The same recipe on other rows; what is None stays. Raises RecipeError where nothing reads rows, or a number is impossible."""
        changed: dict[str, Any] = {
            k: v for k, v in {"text": text, "samples": samples, "length": length}.items() if v is not None
        }
        if not changed:
            return self
        if self.calibration is None:
            raise RecipeError(
                f"recipe {self.name} reads no calibration rows, {', '.join(changed)} was given", "leave the option out"
            )
        if text is not None and text != self.calibration.text:  # these describe the text that the recipe names
            changed |= {"column": None, "split": "train", "revision": None}
        try:
            return self.model_copy(update={"calibration": Calibration.model_validate(self.calibration.model_dump() | changed)})
        except ValidationError as error:
            found = error.errors()[0]
            raise RecipeError(
                f"calibration {found['loc'][0]}: {found['msg']}, {found['input']} was given", "see docs/recipes.md"
            ) from None

    @property
    def graft(self) -> Graft | None:
        return next((s.graft for s in self.steps if s.graft), None)

    @property
    def prune(self) -> Prune | None:
        return next((s.prune for s in self.steps if s.prune), None)

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
        assert isinstance(export, Export), "a gguf export is in `gguf`"
        return export

    @property
    def gguf(self) -> ExportGguf | None:
        """The export step where it makes GGUF files; `export` is then out of bounds."""
        export = self.steps[-1].export
        return export if isinstance(export, ExportGguf) else None


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, defaults filled in: what fingerprints and records hold."""
    return recipe.model_dump(mode="json", exclude_none=True)
