"""From what a person writes to what is meant: YAML with its surprises, and the short forms that nobody misunderstands.

- A key that stands twice in one mapping is refused: YAML would silently take the last.
- `off`, `no` and `false` are one thing to YAML; where a word such as `none` or `off` is meant, they are that word.
- One word where a list belongs is a list of one: `roles: mlp.*`.
- `- export` and `- export:` are a step with its defaults.
- Settings that stand beside their step, and not in it, are told so: one level of indentation is the commonest slip there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel


class PlainLoader(yaml.SafeLoader):
    """YAML as plain data, each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands here twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """YAML as plain data. Raises yaml.YAMLError."""
    return yaml.load(text, PlainLoader)


def yaml_mend(error: yaml.YAMLError) -> str:
    """What to do about YAML that cannot be read."""
    said = str(error)
    if "\\t" in said:
        return "indent with spaces, YAML takes no tabs"
    if "alias" in said:
        return "put what begins with * in quotes: to YAML it is a reference"
    if "mapping values are not allowed" in said:
        return "mend that line: text with a colon and a blank in it goes in quotes, and what belongs together is indented alike"
    return "write the key once" if "twice" in said else "mend the syntax at that line"


def as_meant(part: type[BaseModel], data: Mapping[Any, Any]) -> dict[Any, Any]:
    """Values as the fields of a part of a recipe want them, wherever there is no doubt; everything else as it is."""
    fields = part.model_fields
    return {key: _value(fields[key].annotation, value) if key in fields else value for key, value in data.items()}


def _value(annotation: Any, value: Any) -> Any:
    if value is False:
        return next((word for word in ("off", "none") if word in words_of(annotation)), value)
    many = get_origin(annotation) is tuple and get_args(annotation)[-1] is Ellipsis
    return [value] if many and isinstance(value, str) else value


def words_of(annotation: Any) -> Iterator[str]:
    """The words that a field takes."""
    if get_origin(annotation) is Literal:
        yield from (word for word in get_args(annotation) if isinstance(word, str))
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for choice in get_args(annotation):
            yield from words_of(choice)


def parts_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The parts of a recipe that a field holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from parts_of(inner)


def step_as_meant(step: type[BaseModel], data: object) -> object:
    """One entry of `steps`. Raises ValueError where settings stand beside the step that they belong into."""
    if isinstance(data, str):
        return {data: {}}
    if not isinstance(data, Mapping):
        return data
    if list(data.values()) == [None]:
        return {key: {} for key in data}
    for name in data.keys() & step.model_fields.keys():
        own = {key for part in parts_of(step.model_fields[name].annotation) for key in part.model_fields}
        if beside := [key for key in data if key != name and key in own and key not in step.model_fields]:
            raise ValueError(f"settings stand beside {name} that belong into it ({', '.join(beside)}): indent them further")
    return data
