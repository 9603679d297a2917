"""Writes docs/result.md and docs/result.schema.json from the records in the code: `python -m scripts.records`.

A field's meaning, type and unit stand in the code (`qwench.result`, and `qwench.steps.provenance` for the other file) and are told from there; a test holds both files against it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwench.result import FORMAT, Record, Result
from qwench.result.record import NO_UNIT
from qwench.steps.provenance import FORMAT as PROVENANCE_FORMAT
from qwench.steps.provenance import Provenance

DOCS = Path(__file__).parents[1] / "docs"
WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
HEAD = f"""\
# What stands in a release: `result.json` and `provenance.json`

Made from the code by `python -m scripts.records`: change the texts there. The same as a JSON schema: [result.schema.json](result.schema.json).

`result.json` holds what was measured of a release, and nothing that was not: cards, reports and comparisons are made from it alone. This is format {FORMAT}. A record without `format` is
of format 1 and still reads, since fields that came later have a default; a record of a later format than the reader knows is refused. Numbers are whole or floating-point as JSON has them; NaN and
infinity do not occur. `null`, or a missing field, means: not measured, or not there.

`provenance.json` (format {PROVENANCE_FORMAT}) holds what a release was made from: [its section](#provenancejson) is at the end, [publishing.md](publishing.md) tells what it is for.

"""


def schema() -> str:
    """The JSON schema of a record, as the file has it."""
    data = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Result.model_json_schema()
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def page() -> str:
    """The page for people."""
    own = sections(Result)
    others = {name: text for name, text in sections(Provenance).items() if name not in own}
    return HEAD + "## result.json\n\n" + "\n".join(own.values()) + "\n## provenance.json\n\n" + "\n".join(others.values())


def sections(record: type[Record]) -> dict[str, str]:
    """A section for a record and for each that it holds, in the order in which a reader meets them: name -> Markdown."""
    data = record.model_json_schema()
    definitions = {record.__name__: data, **data.pop("$defs", {})}
    waiting, found = [record.__name__], dict[str, str]()
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = section(name, definitions[name])
            waiting += references(definitions[name].get("properties", {}))
    return found


def section(name: str, definition: dict[str, Any]) -> str:
    """One record as a table of its fields."""
    rows = [
        f"| `{field}` | {kind(found)} | {', '.join(u for u in units(found) if u != NO_UNIT)} | {cell(found.get('description', ''))} |"
        for field, found in definition["properties"].items()
    ]
    lines = [f"### {name}", "", definition.get("description", ""), "", "| field | type | unit | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *rows, ""])


def kind(found: dict[str, Any]) -> str:
    """The type of a field in words, records as links to their sections."""
    if "$ref" in found:
        name = found["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in found:
        return " or ".join(kind(one) for one in found["anyOf"])
    if "enum" in found:
        return " or ".join(f"`{value}`" for value in found["enum"])
    if found.get("type") == "array":
        held = found.get("prefixItems")
        return " and ".join(kind(one) for one in held) if held else f"list: {kind(found['items'])}"
    if found.get("type") == "object":
        values = found.get("additionalProperties")
        return f"mapping: name to {kind(values)}" if isinstance(values, dict) else "mapping"
    return WORDS[found["type"]]


def units(found: Any) -> list[str]:
    """Every unit that a field names, wherever in its type."""
    if isinstance(found, list):
        return list(dict.fromkeys(name for one in found for name in units(one)))
    if not isinstance(found, dict):
        return []
    own = [found["unit"]] if isinstance(found.get("unit"), str) else []
    return list(dict.fromkeys([*own, *(name for one in found.values() for name in units(one))]))


def references(found: Any) -> list[str]:
    """Names of the records that a definition speaks of, in order."""
    if isinstance(found, list):
        return [name for one in found for name in references(one)]
    if not isinstance(found, dict):
        return []
    own = [found["$ref"].rpartition("/")[2]] if "$ref" in found else []
    return [*own, *(name for one in found.values() for name in references(one))]


def cell(text: str) -> str:
    """Text in one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")


FILES = {"result.schema.json": schema, "result.md": page}
"""Name in docs/ -> what writes it."""


def main() -> None:
    for name, made in FILES.items():
        (DOCS / name).write_text(made(), encoding="utf-8")
        print(f"docs/{name}")


if __name__ == "__main__":
    main()
