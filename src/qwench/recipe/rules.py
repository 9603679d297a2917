"""Rules: which roles get which number format, on which layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from qwench.errors import suggestion
from qwench.numerics.scheme import SCHEMES, Activations, Kind, Scheme, Search
from qwench.recipe.written import as_meant


class Strict(BaseModel):
    """A part of a recipe: no key is guessed, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, data: object) -> object:
        return as_meant(cls, data) if isinstance(data, Mapping) else data


def layers_text(value: object) -> object:
    """A `layers` value as YAML reads it -> as it was meant: a bare 3 is layer 3. Raises ValueError for what cannot be one range."""
    if isinstance(value, bool | float):
        raise ValueError(f"YAML reads this as {str(value).lower()}: write a number, or a range such as '1..' or '0..7'")
    if isinstance(value, list):
        raise ValueError(f"one range is meant here, not the list {value}: write '0..7', or a rule for each")
    return str(value) if isinstance(value, int) else value


def layer_range(text: str) -> tuple[int, int | None]:
    """First and last layer (inclusive, None: to the end) of a `layers` value. Raises ValueError."""
    if text == "all":
        return 0, None
    first, dots, last = text.partition("..")
    try:
        low = int(first or 0)
        high = (int(last) if last else None) if dots else low
    except ValueError:
        raise ValueError(f"layers {text!r} is neither 'all', a number, nor a range such as '1..' or '0..7'") from None
    if low < 0:
        raise ValueError(f"layers {text!r}: layers count from 0, at the beginning")
    if high is not None and high < low:
        raise ValueError(f"layers {text!r}: the range ends before it begins")
    return low, high


def _checked(text: str) -> str:
    layer_range(text)
    return text


Layers = Annotated[str, BeforeValidator(layers_text), AfterValidator(_checked)]
"""Decoder layers: `all`, `3`, `1..`, `0..7` (inclusive)."""


class SchemeSpec(Strict):
    """A number format spelled out, where no short name fits: `{kind: int, bits: 8, group: 64}`; the fields are those of `numerics.Scheme`."""

    kind: Kind
    bits: Literal[4, 8] = 4
    group: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    full_range: bool = False
    activations: Activations = "none"

    @field_validator("group")
    @classmethod
    def _columns(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"{value} columns cannot share a scale: leave group out for one scale in each row")
        return value

    def scheme(self, search: Search) -> Scheme:
        return Scheme(
            self.kind, self.bits, self.group, self.block, self.symmetric, self.full_range, search, activations=self.activations
        )


class Rule(Strict):
    """Roles that get one scheme.

    Attributes:
        roles: globs over roles: `attention.*`, `delta.qkv`, `expert.*`, `mtp.mlp.*`. `*` does not cross into `mtp.` or `vision.`.
        scheme: a short name or a spelled-out scheme; `keep` leaves the weight as it is (to carve an exception out of an earlier rule).
        layers: decoder layers: `all`, `3`, `1..`, `0..7` (inclusive).
        search: how scales are chosen.
    """

    roles: tuple[str, ...] = Field(min_length=1)
    scheme: str | SchemeSpec
    layers: Layers = "all"
    search: Search = "none"

    @field_validator("scheme")
    @classmethod
    def _known(cls, value: str | SchemeSpec) -> str | SchemeSpec:
        if isinstance(value, str) and value != "keep" and value not in SCHEMES:
            raise ValueError(
                f"unknown scheme {value!r}{suggestion(value, [*SCHEMES, 'keep'])}; known: {', '.join(SCHEMES)}, keep"
            )
        return value

    def resolved(self) -> Scheme | None:
        """The scheme, or None for `keep`."""
        if isinstance(self.scheme, SchemeSpec):
            return self.scheme.scheme(self.search)
        if self.scheme == "keep":
            return None
        return replace(SCHEMES[self.scheme], search=self.search)
