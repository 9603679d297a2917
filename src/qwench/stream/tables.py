"""Records with columns -> documents: what JSON lines, Parquet files and data sets of a hub have in common.

A record is a mapping of columns to values; one column is the document: text, or a conversation. It is found by itself where there is no doubt (`text`, `content`, `messages`,
`conversations`, or the only column that could be meant); otherwise the user names it.

Wikitext is stored line by line: as records it would be 20-token scraps. Its articles are put together again, from one heading to the next, as they stood in Wikipedia.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwench.errors import TextError, suggestion
from qwench.stream.chat import IMAGE_PARTS, MEDIA_PARTS, holds_media, looks_like_chat, without_images
from qwench.stream.images import image_of
from qwench.stream.rows import Document

USUAL = ("text", "content", "messages", "conversations")
MEDIA_COLUMNS = {"image", "images", "video", "videos", "audio", "audios"}
MOVING = re.compile("video|audio", re.IGNORECASE)
"""In the names of columns that hold what is no image."""
HEADING = re.compile(r" ?= (?!=)[^\n]*[^=\s] = ?\n?")

Record = Mapping[str, Any]
Placed = tuple[str, Record]
"""A record, and where it stands: `text.jsonl, line 7`."""


def documents_of(records: Iterable[Placed], title: str, column: str | None, folder: Path | None = None) -> Iterator[Document]:
    """The documents in records, as they are needed.

    Args:
        title: the name of the whole, for errors.
        column: which column holds the document; None: found by itself.
        folder: what paths of images are relative to.

    Raises:
        TextError: there is no record, no such column, no one column, or a value that is neither text nor conversation.
    """
    records = iter(records)
    first = next(records, None)
    if first is None:
        raise TextError(f"{title} is empty: it holds no record", "give a text with something in it")
    name = _named(first[1], title, column) if column else _found(first[1], title)
    for place, record in itertools.chain([first], records):
        yield _document(place, record, name, folder)


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
    return TextError(
        f"{place} has no column {column!r}{suggestion(column, map(str, record))}; it has {_list(record)}",
        "name one of these as calibration.column",
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


def _document(place: str, record: Record, column: str, folder: Path | None) -> Document:
    if column not in record:
        raise _no_column(place, column, record)
    value, beside = record[column], {n: item for n, item in record.items() if n != column and _is_medium(n, item)}
    name, media = record["name"] if isinstance(record.get("name"), str) else place, bool(beside)
    images, moving = [image_of(item, folder) for item in _images(beside)], any(MOVING.search(n) for n in beside)
    if value is None:
        return Document(name, media=media, images=tuple(images), moving=moving)
    if isinstance(value, str):
        return Document(name, text=value, media=media, images=tuple(images), moving=moving)
    if isinstance(value, Sequence) and all(isinstance(message, Mapping) for message in value):
        messages, own = without_images(value)
        waiting = iter(images)
        inside = tuple(next(waiting, None) if item is None else image_of(item, folder) for item in own)
        found = inside if own else tuple(images)
        moving = moving or holds_media(messages, MEDIA_PARTS - IMAGE_PARTS)
        return Document(name, "", messages, media or holds_media(value), found, moving)
    raise TextError(
        f"{place}: column {column!r} holds {type(value).__name__}, neither text nor a list of messages",
        f"name another column as calibration.column; there are {_list(record)}",
    )


def _images(beside: Record) -> Iterator[object]:
    """The values of columns beside the text that are images, one by one."""
    for name, item in beside.items():
        if not MOVING.search(name):
            yield from item if isinstance(item, list | tuple) else [item]


def _is_medium(name: str, value: object) -> bool:
    """Whether a column beside the text holds an image or the like: by its name, or as a file that was not decoded."""
    if isinstance(value, list | tuple):
        return any(_is_medium(name, item) for item in value)
    return bool(value) and (name in MEDIA_COLUMNS or (isinstance(value, Mapping) and {"bytes", "path"} == {*value}))
