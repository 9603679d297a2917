"""Records with columns -> documents: what JSON lines, Parquet files and data sets of a hub have in common.

A record is a mapping of columns to values; one column is the document: text, or a conversation. It is found by itself where there is no doubt (`text`, `content`, `messages`,
`conversations`, or the only column that could be meant); otherwise the user names it.

Wikitext is stored line by line: as records it would be 20-token scraps. Its articles are put together again, from one heading to the next, as they stood in Wikipedia.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qwench.errors import TextError
from qwench.stream.chat import holds_media, looks_like_chat
from qwench.stream.rows import Document

USUAL = ("text", "content", "messages", "conversations")
MEDIA_COLUMNS = {"image", "images", "video", "videos", "audio", "audios"}
HEADING = re.compile(r" ?= (?!=)[^\n]*[^=\s] = ?\n?")

Record = Mapping[str, Any]
Placed = tuple[str, Record]
"""A record, and where it stands: `text.jsonl, line 7`."""


def documents_of(records: Iterable[Placed], title: str, column: str | None) -> Iterator[Document]:
    """The documents in records, as they are needed.

    Args:
        title: the name of the whole, for errors.
        column: which column holds the document; None: found by itself.

    Raises:
        TextError: there is no record, no such column, no one column, or a value that is neither text nor conversation.
    """
    records = iter(records)
    first = next(records, None)
    if first is None:
        raise TextError(f"{title} is empty: it holds no record", "give a text with something in it")
    name = _named(first[1], title, column) if column else _found(first[1], title)
    for place, record in itertools.chain([first], records):
        yield _document(place, record, name)


def articles(lines: Iterable[Document]) -> Iterator[Document]:
    """Wikitext's articles, from its lines."""
    title = ""
    text: list[str] = []
    for line in lines:
        if HEADING.fullmatch(line.text):
            if "".join(text).strip():
                yield Document(title or "before the first heading", "".join(text))
            title, text = line.text.strip(" =\n"), []
        text.append(line.text if line.text.endswith("\n") else line.text + "\n")
    if "".join(text).strip():
        yield Document(title or "wikitext without headings", "".join(text))


def _named(record: Record, title: str, column: str) -> str:
    if column in record:
        return column
    raise _no_column(title, column, record)


def _no_column(place: str, column: str, record: Record) -> TextError:
    near = difflib.get_close_matches(column, list(record), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return TextError(
        f"{place} has no column {column!r}{hint}; it has {_list(record)}", "name one of these as calibration.column"
    )


def _found(record: Record, title: str) -> str:
    """The column that must be meant."""
    for name in USUAL:
        if name in record:
            return name
    likely = [name for name, value in record.items() if isinstance(value, str) or looks_like_chat(value)]
    if len(likely) == 1:
        return likely[0]
    raise TextError(f"{title} has the columns {_list(record)}: which one is the text?", "name it as calibration.column")


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(str, names)) or "none"


def _document(place: str, record: Record, column: str) -> Document:
    if column not in record:
        raise _no_column(place, column, record)
    value, media = record[column], any(_is_medium(name, item) for name, item in record.items() if name != column)
    name = record["name"] if isinstance(record.get("name"), str) else place
    if value is None:
        return Document(name, media=media)
    if isinstance(value, str):
        return Document(name, text=value, media=media)
    if isinstance(value, Sequence) and all(isinstance(message, Mapping) for message in value):
        return Document(name, messages=tuple(dict(m) for m in value), media=media or holds_media(value))
    raise TextError(
        f"{place}: column {column!r} holds {type(value).__name__}, neither text nor a list of messages",
        f"name another column as calibration.column; there are {_list(record)}",
    )


def _is_medium(name: str, value: object) -> bool:
    """Whether a column beside the text holds an image or the like: by its name, or as a file that was not decoded."""
    if isinstance(value, list | tuple):
        return any(_is_medium(name, item) for item in value)
    return bool(value) and (name in MEDIA_COLUMNS or (isinstance(value, Mapping) and {"bytes", "path"} == {*value}))
