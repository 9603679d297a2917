"""What is wrong with a recipe, in words: the place, what was meant there, and the nearest thing that exists."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from qwench.errors import suggestion
from qwench.recipe.gguf import GGUF_TAG, TENSORS_TAG, ExportGguf
from qwench.recipe.recipe import Recipe
from qwench.recipe.steps import Export
from qwench.recipe.written import parts_of

TAGS: Mapping[str, type[BaseModel]] = {GGUF_TAG: ExportGguf, TENSORS_TAG: Export}
"""What pydantic puts into a place to tell two kinds apart; a person never wrote it."""
Place = tuple[int | str, ...]


def explain(error: ValidationError) -> list[str]:
    """Pydantic's complaints as lines that name the place, with a suggestion for unknown names."""
    lines, said = list[str](), list[Place]()
    for item in error.errors():
        within = any(place[: len(item["loc"])] == item["loc"] for place in said)
        if item["type"] == "default_factory_not_called" or (item["type"] == "too_short" and within):
            continue  # what follows from a complaint before it
        if _other_choice(item):
            continue
        said.append(item["loc"])
        place = ".".join(str(part) for part in item["loc"] if _written(part))
        lines.append(f"{place or 'recipe'}: {_words(item)}")
    return list(dict.fromkeys(lines))


def _written(part: int | str) -> bool:
    """Whether a person wrote this part of a place, and not pydantic."""
    return isinstance(part, int) or (part not in TAGS and part not in ("str", "bool", *_part_names()) and "[" not in part)


def _other_choice(item: Any) -> bool:
    """Whether a complaint is about the kind of value that was not chosen: where a word or a mapping is taken, what is no mapping was meant as a word."""
    chosen = [part for part in item["loc"] if not _written(part) and part not in TAGS]
    mapping = isinstance(item["input"], Mapping)
    return bool(chosen) and (
        item["type"] in ("model_type", "dict_type", "bool_parsing", "bool_type")
        or (mapping and item["type"] in ("string_type", "literal_error"))
    )


def _words(item: Any) -> str:
    kind, given = item["type"], item["input"]
    if kind == "extra_forbidden":
        return f"unknown key{_key_hint(item['loc'])}"
    if kind == "literal_error" and isinstance(given, bool):
        return f"{_not_a_word(given)}, one of {item['ctx']['expected']}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", item["ctx"]["expected"])
        return f"{given!r} is none of {item['ctx']['expected']}{suggestion(str(given), choices)}"
    if kind == "string_type" and given is not None:
        return _not_a_word(given)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"keys with values are meant here, such as {{key: value}}, and {given!r} was given"
    if kind in ("tuple_type", "list_type"):
        return f"a list is meant here, [one, two] or a line with a dash for each, and {_short(given)} was given"
    if kind == "missing":
        return "this key is needed"
    return str(item["msg"]).removeprefix("Value error, ") + (f", {given!r} was given" if kind.endswith("_parsing") else "")


def _not_a_word(given: object) -> str:
    if isinstance(given, bool):
        return f"YAML reads this as {str(given).lower()} (on, off, yes and no too): put the word in quotes"
    if isinstance(given, int | float | datetime.date):
        return (
            f"YAML reads this as {'the date' if isinstance(given, datetime.date) else 'the number'} {given}: put it in quotes"
        )
    return f"one word is meant here, and {_short(given)} was given"


def _short(given: object) -> str:
    return (
        "keys with values"
        if isinstance(given, Mapping)
        else "a list"
        if isinstance(given, Sequence) and not isinstance(given, str)
        else repr(given)
    )


def _key_hint(place: Place) -> str:
    """What an unknown key may have been: a key of the same part, or one that stands elsewhere."""
    word = str(place[-1])
    if near := suggestion(word, sorted({key for part in parts_at(place[:-1]) for key in part.model_fields})):
        return near
    homes = [name for name, part in _named_parts() if word in part.model_fields]
    return (
        f" (it is a key of {homes[0]})"
        if homes
        else suggestion(word, sorted({key for _, part in _named_parts() for key in part.model_fields}))
    )


def parts_at(place: Place) -> list[type[BaseModel]]:
    """The part of a recipe at a place; several where two kinds can stand there."""
    parts: list[type[BaseModel]] = [Recipe]
    for name in place:
        if isinstance(name, int):
            continue
        inner = [found for part in parts if name in part.model_fields for found in parts_of(part.model_fields[name].annotation)]
        chosen = [part for part in parts if part is TAGS.get(name) or part.__name__ == name]
        parts = inner or chosen or parts
    return parts


@cache
def _named_parts() -> tuple[tuple[str, type[BaseModel]], ...]:
    """Every part of a recipe with the key that it stands under."""

    def below(part: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
        for name, field in part.model_fields.items():
            for inner in parts_of(field.annotation):
                yield name, inner
                yield from below(inner)

    return ("the recipe itself", Recipe), *dict.fromkeys(below(Recipe))


@cache
def _part_names() -> frozenset[str]:
    return frozenset(part.__name__ for _, part in _named_parts())
