"""Rows of tokens: what every measurement and every calibration reads.

A row is one document's first `length` tokens. All rows are equally long, so that they stack, and no row holds two documents, so that rows are
independent and a standard error over documents means what it says. Documents that are too short are skipped and counted.

A text is a local file:

- `.jsonl`: one document per line, `{"name": ..., "text": ...}`, or `{"messages": [...]}`, which goes through the tokenizer's chat template;
- `.txt`: one long text, cut into consecutive stretches of `length` tokens. Neighbouring stretches are not independent: a standard error over
  them is too small.

Calibration has more freedom (data sets of a hub, packed rows, a shuffle): see `calibration`.

Tokenizers are read from the checkpoint's own folder, from local files alone; one that wants to run code of its own is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwench.errors import CheckpointError, TextError
from qwench.stream.images import Image, Pictures

HELD_OUT = "held.jsonl"
CALIBRATION = "calibration.jsonl"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True)
class Document:
    """One document of a text: plain text, or a conversation for the chat template.

    Attributes:
        media: whether its record holds images, video or sound beside the text.
        images: its images in the order in which they stand; None for one that is not on this machine.
        moving: whether there is video or sound among the media.
    """

    name: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    media: bool = False
    images: tuple[Image | None, ...] = ()
    moving: bool = False


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, and where they came from.

    Attributes:
        ids: int64 [rows, length].
        documents: for each row, the number of its document in the text.
        names: for each row, the name of its document.
        text: the name of the text.
        text_sha256: SHA-256 of the file that the text was read from, in hexadecimal; of the documents read, where there is no one file.
        ids_sha256: SHA-256 of `ids` as little-endian int64, in hexadecimal.
        skipped: documents that were read and were too short.
        revision: the commit of a data set on a hub.
        left_out: documents that gave no tokens, counted by reason.
        pictures: images in the rows; None in rows of text alone.
    """

    ids: Tensor
    documents: tuple[int, ...]
    names: tuple[str, ...]
    text: str
    text_sha256: str
    ids_sha256: str
    skipped: int = 0
    revision: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    pictures: Pictures | None = None

    def __post_init__(self) -> None:
        assert self.ids.dim() == 2 and self.ids.dtype == torch.int64
        assert len(self.documents) == len(self.names) == len(self.ids)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def digest(self) -> str:
        """What differs where tokens or images do."""
        return self.ids_sha256 + (self.pictures.sha256 if self.pictures else "")


def held_out_rows(tokenizer_folder: Path, documents: int = 16, length: int = 512) -> Rows:
    """The first `documents` documents of the held-out text that the package carries. Raises CheckpointError, TextError."""
    return rows_from_text(
        carried_text(HELD_OUT), tokenizer_folder, documents, length, name="Python standard library, held-out modules"
    )


def carried_text(name: str) -> Path:
    """The path of a text that the package carries: `held.jsonl` or `calibration.jsonl`. Raises TextError."""
    path = Path(str(resources.files("qwench") / "demo" / "text" / name))
    if not path.is_file():
        raise TextError(
            f"the package lacks its text {name}", "install the package again, or give a .jsonl or .txt file of your own"
        )
    return path


def rows_from_text(path: Path, tokenizer_folder: Path, documents: int, length: int, name: str | None = None) -> Rows:
    """The first `documents` rows of `length` tokens of a local text.

    Args:
        path: a `.jsonl` or `.txt` file, see the module's list.
        tokenizer_folder: the checkpoint folder whose tokenizer cuts the text.
        documents: rows wanted.
        length: tokens in each.
        name: what to call the text in records; the file's name by default.

    Raises:
        CheckpointError: the folder holds no tokenizer that can be read.
        TextError: the text is missing, unreadable, or has too few documents that are long enough.
    """
    if not path.is_file():
        raise TextError(f"there is no text {path}", "give an existing .jsonl or .txt file")
    tokenizer = load_tokenizer(tokenizer_folder)
    sha256, title = file_sha256(path), name or path.name
    if path.suffix == ".txt":
        return _rows_of_one_text(_read(path), tokenizer, documents, length, title, sha256)
    if path.suffix == ".jsonl":
        return rows_from_documents(read_documents(path), tokenizer, documents, length, title, sha256)
    raise TextError(
        f"{path.name}: texts are .jsonl or .txt, not {path.suffix or 'files without an ending'}", "convert it to one of those"
    )


def rows_from_documents(
    found: Iterable[Document], tokenizer: Any, documents: int, length: int, text: str, text_sha256: str
) -> Rows:
    """One row from each document that has `length` tokens, until there are `documents` rows.

    Raises TextError where there are fewer, saying how many documents were too short.
    """
    _check_sizes(documents, length)
    rows: list[list[int]] = []
    indices: list[int] = []
    names: list[str] = []
    read = 0
    for index, document in enumerate(found):
        read = index + 1
        ids = _tokens(tokenizer, document, length)
        if len(ids) == length:
            rows.append(ids)
            indices.append(index)
            names.append(document.name)
        if len(rows) == documents:
            break
    if len(rows) < documents:
        raise TextError(
            f"{text} has {len(rows)} documents of at least {length} tokens among {read}; {documents} were asked for",
            f"ask for {len(rows)} documents, for shorter rows, or give a longer text"
            if rows
            else "ask for shorter rows, or give a longer text",
        )
    return _finished(rows, indices, names, text, text_sha256, skipped=read - len(rows))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a checkpoint folder, from its local files alone. Raises CheckpointError."""
    from transformers import AutoTokenizer  # seconds to import, and only needed here

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)})",
            "copy the tokenizer files of the base checkpoint there",
        )
    if _wants_code(folder / "tokenizer_config.json"):
        raise CheckpointError(
            f"the tokenizer in {folder} wants to run code of its own (auto_map in tokenizer_config.json)",
            "use a tokenizer of a class that transformers itself has",
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a broken file makes transformers or tokenizers raise
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}", "copy the tokenizer files again") from error


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a `.jsonl` file, as they are needed. Raises TextError naming the line."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _document(line, path.name, number)
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8: {error}", "convert it to UTF-8") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _document(line: str, file: str, number: int) -> Document:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{file}, line {number} is not JSON: {error}", "each line is one JSON object") from None
    if isinstance(data, dict):
        name = str(data.get("name", f"{file}:{number}"))
        if isinstance(data.get("text"), str):
            return Document(name, text=data["text"])
        if isinstance(data.get("messages"), list):
            return Document(name, messages=tuple(data["messages"]))
    raise TextError(
        f"{file}, line {number} has neither a text nor a list of messages", 'write {"text": "..."} or {"messages": [...]}'
    )


def _tokens(tokenizer: Any, document: Document, length: int) -> list[int]:
    """The first `length` token ids of a document, or all of them."""
    text = document.text
    if document.messages:
        try:
            text = tokenizer.apply_chat_template(list(document.messages), tokenize=False)
        except Exception as error:  # templates are programs: they raise what they like
            raise TextError(
                f"the chat template refuses {document.name}: {error}", "mend the messages of that document"
            ) from error
    encoded = tokenizer(text, add_special_tokens=False, truncation=True, max_length=length)
    return list(encoded["input_ids"])


def _rows_of_one_text(content: str, tokenizer: Any, documents: int, length: int, text: str, text_sha256: str) -> Rows:
    """Consecutive stretches of one text. Raises TextError where it is too short."""
    _check_sizes(documents, length)
    ids = _tokens(tokenizer, Document(text, text=content), documents * length)
    if len(ids) < documents * length:
        raise TextError(
            f"{text} has {len(ids)} tokens; {documents} rows of {length} tokens need {documents * length}",
            f"ask for {len(ids) // length} rows, for shorter rows, or give a longer text",
        )
    rows = [ids[start : start + length] for start in range(0, documents * length, length)]
    return _finished(rows, list(range(documents)), [f"{text} [{i}]" for i in range(documents)], text, text_sha256, skipped=0)


def _finished(rows: list[list[int]], indices: list[int], names: list[str], text: str, text_sha256: str, skipped: int) -> Rows:
    ids = torch.tensor(rows, dtype=torch.int64)
    return Rows(ids, tuple(indices), tuple(names), text, text_sha256, ids_sha256(ids), skipped)


def ids_sha256(ids: Tensor) -> str:
    """SHA-256 of token ids as little-endian int64, in hexadecimal."""
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _check_sizes(documents: int, length: int) -> None:
    if documents < 1 or length < 2:
        raise TextError(
            f"{documents} rows of {length} tokens cannot be measured", "ask for at least 1 row of at least 2 tokens"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8: {error}", "convert it to UTF-8") from None


def _wants_code(path: Path) -> bool:
    try:
        return "auto_map" in json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "copy the tokenizer files again") from None
