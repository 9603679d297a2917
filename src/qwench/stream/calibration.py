"""Calibration rows: `samples` rows of `length` tokens out of a text, the same ones on every machine.

    text -> documents -> (pieces) -> shuffled -> tokens -> rows

**Shuffled.** Documents are numbered as they are stored. They are taken in windows of 64 million characters; in a window they are taken in ascending order of SHA-256("SEED:NUMBER").
That needs no library's random numbers, is the same everywhere and for ever, and reads no more of a huge data set than the rows need. More rows of the same seed begin with the
same rows.

**Packed** (the default): documents are joined by the end-of-text token and cut into rows. A long document takes part as several pieces of about 8 characters for each token of a row,
cut at ends of lines: otherwise one book would fill all rows. **Not packed**: a row is one document's first `length` tokens; shorter documents are skipped and counted. A `.txt` file has no documents: its pieces
are taken for them.

**Images.** Rows are text alone, and no image processor is ever asked for. A record with images, video or sound is left out, or taken without them, and counted either way. Rows that hold
the images themselves do not exist yet.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from qwench.errors import CheckpointError, TextError
from qwench.stream.chat import Thinking, render
from qwench.stream.rows import Document, Rows, ids_sha256, load_tokenizer
from qwench.stream.texts import find_text

WINDOW = 64_000_000
"""Characters of documents that are shuffled together."""
PIECE = 8
"""Characters of a piece for each token of a row: rows of text take 3 to 5, of Chinese less than 2."""
END_OF_TEXT = "<|endoftext|>"
"""What Qwen's models saw between documents; their `eos_token` ends a turn, not a document."""

Images = Literal["skip", "text"]
Numbered = tuple[int, Document]


def calibration_rows(
    tokenizer_folder: Path,
    text: str = "carried",
    *,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    packed: bool = True,
    column: str | None = None,
    split: str = "train",
    revision: str | None = None,
    thinking: Thinking = "filled",
    images: Images = "skip",
) -> Rows:
    """Rows of tokens for calibration.

    Args:
        tokenizer_folder: the checkpoint folder whose tokenizer and chat template are used.
        text: see `qwench.stream.texts`; the other arguments are those of `qwench.recipe.Calibration`.

    Returns:
        int64 [samples, length]; `documents` and `names` tell where each row begins; `left_out` counts what gave no tokens, and records taken without their images.

    Raises:
        CheckpointError: the folder holds no tokenizer that can be read.
        TextError: the text is missing, unreadable, or has too few tokens.
    """
    if samples < 1 or length < 2:
        raise TextError(f"{samples} rows of {length} tokens cannot calibrate", "ask for at least 1 row of at least 2 tokens")
    reader = Reader(load_tokenizer(tokenizer_folder), tokenizer_folder, thinking, images)
    found = find_text(text, column, split, revision)
    digest = Digest()
    documents: Iterable[Numbered] = digest.taking(found.documents)
    if packed or found.one_long:
        documents = pieces(documents, PIECE * length)
    take = packed_rows if packed else document_rows
    taken = take(shuffled(documents, seed), reader, samples, length)
    if len(taken.ids) < samples * length:
        raise _too_few(found.name, taken, reader, digest.count, samples, length, packed)
    return taken.rows(length, found.name, found.sha256 or digest.hexdigest(), found.revision, reader)


def shuffled(documents: Iterable[Numbered], seed: int, window: int = WINDOW) -> Iterator[Numbered]:
    """Documents in the order of SHA-256("SEED:PLACE"), window after window; PLACE counts what comes in, from 0."""
    waiting: list[tuple[bytes, Numbered]] = []
    characters = 0
    for place, (number, document) in enumerate(documents):
        waiting.append((hashlib.sha256(f"{seed}:{place}".encode()).digest(), (number, document)))
        characters += _size(document)
        if characters >= window:
            yield from _in_order(waiting)
            waiting, characters = [], 0
    yield from _in_order(waiting)


def pieces(documents: Iterable[Numbered], most: int) -> Iterator[Numbered]:
    """Documents of at most `most` characters: longer texts are cut, at the last end of line in a piece's second half; conversations stay whole."""
    for number, document in documents:
        if len(document.text) <= most:
            yield number, document
            continue
        for part, (start, stop) in enumerate(_cuts(document.text, most)):
            yield number, replace(document, name=f"{document.name} [{part}]", text=document.text[start:stop])


def _cuts(text: str, most: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(text):
        stop = start + most
        if stop < len(text):
            line = text.rfind("\n", start + most // 2, stop)
            stop = stop if line < 0 else line + 1
        yield start, min(stop, len(text))
        start = stop


def _in_order(waiting: list[tuple[bytes, Numbered]]) -> Iterator[Numbered]:
    waiting.sort(key=lambda item: item[0])
    return (numbered for _, numbered in waiting)


def _size(document: Document) -> int:
    return len(document.text) + sum(len(str(value)) for message in document.messages for value in message.values())


class Digest:
    """Numbers documents as they are read, and hashes them."""

    def __init__(self) -> None:
        self.count, self._sha256 = 0, hashlib.sha256()

    def taking(self, documents: Iterable[Document]) -> Iterator[Numbered]:
        for document in documents:
            line = json.dumps([document.text, document.messages], sort_keys=True, default=lambda value: type(value).__name__)
            self._sha256.update(line.encode() + b"\n")
            self.count += 1
            yield self.count - 1, document

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


@dataclass
class Reader:
    """Turns documents into tokens, and counts those that give none.

    Attributes:
        tokenizer: of the checkpoint in `folder`.
        thinking, images: see `qwench.recipe.Calibration`.
        left_out: documents by what became of them.
        refusal: what the first refused conversation was refused for.
    """

    tokenizer: Any
    folder: Path
    thinking: Thinking
    images: Images
    left_out: Counter[str] = field(default_factory=Counter)
    refusal: str = ""

    def tokens(self, document: Document, most: int | None = None) -> list[int]:
        """The token ids of a document, or the first `most` of them; none where it is left out."""
        if document.media and self.images == "skip":
            self.left_out["with images"] += 1
            return []
        text = self._conversation(document) if document.messages else document.text
        if text is None:
            return []
        if not text.strip():
            self.left_out["empty"] += 1
            return []
        if document.media:
            self.left_out["taken without images"] += 1
        # verbose: the tokenizer would warn that a document is longer than the model's context
        cut = {} if most is None else {"truncation": True, "max_length": most}
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False, **cut)["input_ids"])

    def _conversation(self, document: Document) -> str | None:
        if not self.tokenizer.chat_template:
            raise CheckpointError(
                f"the tokenizer in {self.folder} has no chat template, and {document.name} is a conversation",
                "copy chat_template.jinja of the base checkpoint there, or calibrate on plain text",
            )
        try:
            return render(self.tokenizer, document, self.thinking)
        except ValueError as error:
            self.left_out["refused conversations"] += 1
            self.refusal = self.refusal or f"{document.name}: {error}"
            return None

    def end_of_text(self) -> int:
        """The token that stands between documents. Raises CheckpointError."""
        found = self.tokenizer.get_vocab().get(END_OF_TEXT, self.tokenizer.eos_token_id)
        if found is None:
            raise CheckpointError(
                f"the tokenizer in {self.folder} has neither {END_OF_TEXT} nor an eos_token to join documents with",
                "copy the tokenizer files of the base checkpoint there, or set calibration.packed to false",
            )
        return int(found)


@dataclass
class Taken:
    """Tokens on their way to rows.

    Attributes:
        ids: one after the other.
        starts: where documents begin in `ids`, ascending, the first at 0.
        documents, names: the numbers and names of these documents.
    """

    ids: array[int] = field(default_factory=lambda: array("q"))
    starts: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, number: int, document: Document, tokens: list[int]) -> None:
        self.starts.append(len(self.ids))
        self.documents.append(number)
        self.names.append(document.name)
        self.ids.extend(tokens)

    def rows(self, length: int, text: str, text_sha256: str, revision: str | None, reader: Reader) -> Rows:
        flat = np.frombuffer(self.ids, dtype=np.int64)
        ids = torch.from_numpy(flat[: len(flat) // length * length].reshape(-1, length).copy())
        first = [bisect.bisect_right(self.starts, row * length) - 1 for row in range(len(ids))]
        documents, names = tuple(self.documents[i] for i in first), tuple(self.names[i] for i in first)
        skipped = reader.left_out["too short"]
        return Rows(ids, documents, names, text, text_sha256, ids_sha256(ids), skipped, revision, dict(reader.left_out))


def packed_rows(documents: Iterable[Numbered], reader: Reader, samples: int, length: int) -> Taken:
    """Documents joined by the end-of-text token, until there are enough tokens; as many as there are, where there are too few."""
    taken, end, wanted = Taken(), reader.end_of_text(), samples * length
    for number, document in documents:
        tokens = reader.tokens(document)
        if tokens:
            if taken.ids:
                taken.ids.append(end)
            taken.add(number, document, tokens)
        if len(taken.ids) >= wanted:
            del taken.ids[wanted:]
            break
    return taken


def document_rows(documents: Iterable[Numbered], reader: Reader, samples: int, length: int) -> Taken:
    """One row for each document that is long enough; as many as there are, where there are too few."""
    taken = Taken()
    for number, document in documents:
        tokens = reader.tokens(document, length)
        if len(tokens) == length:
            taken.add(number, document, tokens)
        elif tokens:
            reader.left_out["too short"] += 1
        if len(taken.ids) == samples * length:
            break
    return taken


def _too_few(name: str, taken: Taken, reader: Reader, read: int, samples: int, length: int, packed: bool) -> TextError:
    """What there was and what was wanted."""
    rows = len(taken.ids) // length
    there = f"{len(taken.ids)} tokens" if packed else f"{rows} documents of at least {length} tokens"
    wanted = f"need {samples * length}" if packed else "need as many documents"
    what = f"{name} has {there}, in {read} documents; {samples} rows of {length} tokens {wanted}{_left_out(reader.left_out)}"
    if reader.refusal:
        what += f"; the first refused was {reader.refusal}"
    fewer = f"set calibration.samples to {rows}, " if rows else ""
    return TextError(what, f"{fewer}shorten calibration.length, {'' if packed else 'pack the documents, '}or give more text")


def _left_out(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count} {reason}' for reason, count in counts.items())})" if counts else ""
