"""Rules: which roles get which number format, on which layers."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from qwench.numerics.scheme import SCHEMES, Activations, Kind, Scheme, Search


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SchemeSpec(Strict):
    """A number format spelled out, where no short name fits: `{kind: int, bits: 8, group: 64}`; the fields are those of `numerics.Scheme`."""

    kind: Kind
    bits: Literal[4, 8] = 4
    group: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    full_range: bool = False
    activations: Activations = "none"

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
    layers: str = "all"
    search: Search = "none"

    @field_validator("scheme")
    @classmethod
    def _known(cls, value: str | SchemeSpec) -> str | SchemeSpec:
        if isinstance(value, str) and value != "keep" and value not in SCHEMES:
            raise ValueError(
                f"unknown scheme {value!r}{suggestion(value, [*SCHEMES, 'keep'])}; known: {', '.join(SCHEMES)}, keep"
            )
        return value

    @field_validator("layers")
    @classmethod
    def _range(cls, value: str) -> str:
        layer_range(value)
        return value

    def resolved(self) -> Scheme | None:
        """The scheme, or None for `keep`."""
        if isinstance(self.scheme, SchemeSpec):
            return self.scheme.scheme(self.search)
        if self.scheme == "keep":
            return None
        return replace(SCHEMES[self.scheme], search=self.search)


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
    if high is not None and high < low:
        raise ValueError(f"layers {text!r}: the range ends before it begins")
    return low, high


def suggestion(word: str, known: list[str]) -> str:
    """` (did you mean X?)`, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
