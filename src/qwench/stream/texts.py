"""Where documents come from: a word that a person wrote -> a text, read as it is needed.

    carried                               the calibration text that the package carries
    notes.txt                             one long text; it has no documents, so it is taken in pieces
    chats.jsonl, chats.json               records, one in each line or in a list
    rows.parquet, a folder                through the `datasets` library (extra `data`); a folder as the hub lays out a data set, FOLDER/config if it has several
    a folder of .txt files                each file is a document
    org/name, org/name/config@revision    a data set on the hub (extra `data`)

What exists on this machine wins over what reads the same on the hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwench.errors import TextError, suggestion, suggestion_beside
from qwench.stream import datasets_hub
from qwench.stream.rows import CALIBRATION, Document, carried_text, file_sha256
from qwench.stream.tables import Placed, articles, documents_of

BLOCK = 1 << 20
"""Characters of a long text that are read at once."""
SETS = ("carried", *datasets_hub.SHORT)
"""Texts that have a name of their own."""
FILES = (".txt", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Text:
    """A text to take documents from, once.

    Attributes:
        name: what records call it.
        documents: read as they are needed.
        sha256: of the one file, or None where there is no one file.
        revision: the commit of a data set on the hub.
        one_long: it has no documents of its own.
    """

    name: str
    documents: Iterator[Document]
    sha256: str | None = None
    revision: str | None = None
    one_long: bool = False


def find_text(text: str, column: str | None, split: str, revision: str | None) -> Text:
    """The text that a person means; see the module's list.

    Args:
        column: of records; None: found by itself.
        split: of a data set.
        revision: of a data set on the hub, if `text` has none.

    Raises:
        TextError: there is no such text, or it is of a kind that we cannot read. What is wrong inside of it comes when documents are read.
    """
    if text == "carried":
        path = carried_text(CALIBRATION)
        documents = documents_of(_lines(path), path.name, "text")
        return Text("Python standard library, calibration modules", documents, file_sha256(path))
    path = Path(text).expanduser()
    if local := _local(path, column, split):
        if revision:
            raise TextError(f"{path} is on this machine and has no revision {revision!r}", "take the revision out")
        return local
    if path.suffix in FILES or text.startswith((".", "/", "~")):
        raise TextError(
            f"there is no text {path}{suggestion_beside(path)}",
            f"give a {', '.join(FILES)} file, a folder, or a data set's org/name",
        )
    if text not in SETS and "/" not in text and (near := suggestion(text, SETS)):
        raise TextError(
            f"there is no text {text!r}{near}", f"give {', '.join(SETS)}, a file, a folder, or a data set's org/name"
        )
    table = datasets_hub.hub_table(text, split, revision)
    return Text(table.name, _of_table(table, column), revision=table.revision)


def _local(path: Path, column: str | None, split: str) -> Text | None:
    """What lies at a path: a file, a folder, or a config of the folder above, which that folder's README.md lists."""
    if path.exists():
        return _folder(path, column, split) if path.is_dir() else _file(path, column)
    readme = path.parent / "README.md"
    if path.name and readme.is_file() and f"config_name: {path.name}\n" in readme.read_text(encoding="utf-8", errors="replace"):
        table = datasets_hub.folder_table(path.parent, split, config=path.name)
        return Text(table.name, _of_table(table, column, path.parent))
    return None


def _of_table(table: datasets_hub.Table, column: str | None, folder: Path | None = None) -> Iterator[Document]:
    documents = documents_of(table.records, table.name, column, folder)
    return articles(documents) if table.line_by_line else documents


def _file(path: Path, column: str | None) -> Text:
    if path.suffix not in FILES:
        raise TextError(
            f"{path.name}: texts are {', '.join(FILES)}, not {path.suffix or 'files without an ending'}",
            "convert it to one of those",
        )
    if path.stat().st_size == 0:
        raise TextError(f"{path} is empty", "give a text with something in it")
    sha256 = file_sha256(path)
    if path.suffix == ".txt":
        return Text(path.name, _blocks(path), sha256, one_long=True)
    if path.suffix == ".parquet":
        return Text(path.name, _of_table(datasets_hub.parquet_table(path), column, path.parent), sha256)
    records = _lines(path) if path.suffix == ".jsonl" or not _is_list(path) else _items(path)
    return Text(path.name, documents_of(records, path.name, column, path.parent), sha256)


def _folder(path: Path, column: str | None, split: str) -> Text:
    """A folder of text files, or a data set as the hub lays it out."""
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    if suffixes & {".parquet", ".jsonl", ".json"}:
        table = datasets_hub.folder_table(path, split)
        return Text(table.name, _of_table(table, column, path))
    texts = sorted(file for file in path.rglob("*.txt") if file.is_file())
    if not texts:
        raise TextError(f"folder {path} holds none of {', '.join(FILES)}", "give a folder with texts in it")
    return Text(path.name, (Document(str(file.relative_to(path)), _whole(file)) for file in texts))


def _is_list(path: Path) -> bool:
    """Whether a .json file is one list; many are JSON lines under another name."""
    with path.open("rb") as file:
        return file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _lines(path: Path) -> Iterator[Placed]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _record(line, f"{path.name}, line {number}")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def _record(line: str, place: str) -> Placed:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{place} is not JSON: {error}", "each line is one JSON object") from None
    return place, _object(data, place)


def _object(data: object, place: str) -> dict[str, object]:
    if not isinstance(data, dict):
        raise TextError(f"{place} is no JSON object", 'write {"text": "..."} or {"messages": [...]}')
    return data


def _items(path: Path) -> Iterator[Placed]:
    try:
        items = json.loads(_whole(path))
    except json.JSONDecodeError as error:
        raise TextError(f"{path} is not JSON: {error}", "write a list of JSON objects, or one object in each line") from None
    for number, item in enumerate(items, start=1):
        place = f"{path.name}, item {number}"
        yield place, _object(item, place)


def _blocks(path: Path) -> Iterator[Document]:
    """A long text, about a million characters at a time, cut at ends of lines."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while block := file.read(BLOCK):
                yield Document(path.name, block + file.readline())
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def _whole(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def _not_utf8(path: Path, error: UnicodeDecodeError) -> TextError:
    return TextError(f"{path} is not UTF-8: {error}", "convert it to UTF-8")
