"""Every field says what it means and every number what it counts; the two files in docs say the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from pydantic import BaseModel

from qwench.result import Result
from qwench.result.record import Record, unit
from qwench.steps.provenance import Provenance
from scripts.records import DOCS, FILES, kind, references, sections, units

Grams = Annotated[float, unit("grams")]


def definitions() -> Iterator[tuple[str, dict[str, Any]]]:
    for record in (Result, Provenance):
        data = record.model_json_schema()
        yield from [(record.__name__, data), *data["$defs"].items()]


def fields() -> list[tuple[str, dict[str, Any]]]:
    return [(f"{name}.{field}", found) for name, data in definitions() for field, found in data["properties"].items()]


def counts(found: Any) -> bool:
    """Whether a number of its own stands anywhere in a field's type; estimates are numbers."""
    if isinstance(found, list):
        return any(counts(one) for one in found)
    if not isinstance(found, dict):
        return False
    return (
        found.get("type") in ("integer", "number")
        or found.get("$ref", "").endswith("/Estimate")
        or any(counts(one) for one in found.values())
    )


def test_every_field_says_what_it_means() -> None:
    assert len(fields()) > 150
    assert not (silent := [name for name, found in fields() if not found.get("description", "").strip()]), silent


def test_every_number_says_what_it_counts() -> None:
    assert not (silent := [name for name, found in fields() if counts(found) and not units(found)]), silent
    assert sum(counts(found) for _, found in fields()) > 100
    assert not (loud := [name for name, found in fields() if units(found) and not counts(found)]), loud


def test_every_record_is_described_and_none_explains_its_fields_twice() -> None:
    for name, data in definitions():
        said = data.get("description", "")
        assert said and not said.startswith("!!!") and "Attributes:" not in said, name


@pytest.mark.parametrize("name", FILES)
def test_docs_say_what_the_code_says(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8") if (DOCS / name).is_file() else ""
    assert written == FILES[name](), f"docs/{name} is not what the code says: run `python -m scripts.records` and commit it"


def test_a_section_shows_type_unit_and_meaning() -> None:
    class Inner(Record):
        """Held."""

        share: float = 0.5
        """Of it."""

    class Outer(Record):
        """Holds | others."""

        one: Inner | None = None
        """Maybe."""
        many: dict[str, list[Grams]]
        """Some | of
        it."""

    found = sections(Outer)
    assert list(found) == ["Outer", "Inner"]
    assert "| `one` | [Inner](#inner) or null |  | Maybe. |" in found["Outer"]
    assert "| `many` | mapping: name to list: number | grams | Some \\| of it. |" in found["Outer"]
    assert "| `share` | number |  | Of it. |" in found["Inner"]


def test_kinds_units_and_references() -> None:
    assert kind({"anyOf": [{"type": "integer"}, {"type": "null"}]}) == "whole number or null"
    assert kind({"enum": ["whole", "hub"], "type": "string"}) == "`whole` or `hub`"
    assert kind({"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]}) == "text and whole number"
    assert units({"anyOf": [{"unit": "bytes"}, {"items": {"unit": "bytes"}}, {"unit": "rows"}]}) == ["bytes", "rows"]
    assert references({"a": [{"$ref": "#/$defs/A"}], "b": {"items": {"$ref": "#/$defs/B"}}}) == ["A", "B"]
    assert issubclass(Record, BaseModel) and unit("m").json_schema_extra == {"unit": "m"}
