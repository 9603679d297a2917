"""Calibration rows: `samples` rows of `length` tokens out of a text, the same ones on every machine.

    text -> documents -> (pieces) -> shuffled -> tokens -> rows

**Shuffled.** Documents are numbered as they are stored. They are taken in windows of 64 million characters; in a window they are taken in ascending order of SHA-256("SEED:NUMBER").
That needs no library's random numbers, is the same everywhere and for ever, and reads no more of a huge data set than the rows need. More rows of the same seed begin with the
same rows.

**Packed** (the default): documents are joined by the end-of-text token and cut into rows. A long document takes part as several pieces of about 8 characters for each token of a row,
cut at ends of lines: otherwise one book would fill all rows. **Not packed**: a row is one document's first `length` tokens; shorter documents are skipped and counted. A `.txt` file has no documents: its pieces
are taken for them.

**Images.** Rows are text alone unless `images` is `use`, and then no image processor is ever asked for. A record with images, video or sound is left out (`skip`), or taken without them
(`text`), and counted either way. With `use` a row holds a record's images too: in place of each stand as many tokens as the vision tower makes of it. Such rows are not packed, and a
record with an image that the row's end would cut is left out.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from qwench.errors import CheckpointError, TextError
from qwench.models.grid import Grid, tokens_of
from qwench.stream.chat import IMAGE_MARK, Thinking, render
from qwench.stream.images import ImageProcessor, Picture, Pictures, sha256_of
from qwench.stream.rows import Document, Rows, ids_sha256, load_tokenizer
from qwench.stream.texts import find_text

WINDOW = 64_000_000
"""Characters of documents that are shuffled together."""
PIECE = 8
"""Characters of a piece for each token of a row: rows of text take 3 to 5, of Chinese less than 2."""
END_OF_TEXT = "<|endoftext|>"
"""What Qwen's models saw between documents; their `eos_token` ends a turn, not a document."""

Images = Literal["skip", "text", "use"]
Numbered = tuple[int, Document]
Placed = tuple[int, Grid, Any, str]
"""An image in a row: its first token, its patches, where its bytes are, their SHA-256."""


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
    assert images != "use" or not packed, "rows with images are not packed"
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

    @cached_property
    def processor(self) -> ImageProcessor:
        """The checkpoint's. Raises CheckpointError."""
        return ImageProcessor(self.folder)

    def tokens(self, document: Document, most: int | None = None) -> list[int]:
        """The token ids of a document, or the first `most` of them; none where it is left out."""
        if document.media and self.images == "skip":
            self.left_out["with images"] += 1
            return []
        text = self._text(document)
        if text is None:
            return []
        if not text.strip():
            self.left_out["empty"] += 1
            return []
        if document.media:
            self.left_out["taken without images"] += 1
        return self._ids(text, most)

    def with_images(self, document: Document, most: int) -> tuple[list[int], list[Placed]]:
        """The first `most` token ids of a document with images, and the images among them; none where it is left out."""
        if document.moving:
            return self._without("with video or sound")
        try:
            grids = [self.processor.grid(image) for image in document.images if image is not None]
            hashes = [sha256_of(image) for image in document.images if image is not None]
        except (
            OSError,
            ValueError,
            SyntaxError,
        ):  # what Pillow raises for a broken file, the processor for an impossible shape
            return self._without("with images that cannot be read")
        if len(grids) < len(document.images):
            return self._without("with images that are not on this machine")
        text = self._text(document, images=True)
        if text is None:
            return [], []
        ids = self._ids(text)
        starts = [place for place, token in enumerate(ids) if token == self.processor.token_id]
        if len(starts) != len(grids):
            return self._without("with text that names image tokens")
        return self._expanded(ids, starts, list(zip(grids, document.images, hashes, strict=True)), most)

    def _expanded(
        self, ids: list[int], starts: list[int], images: list[tuple[Grid, Any, str]], most: int
    ) -> tuple[list[int], list[Placed]]:
        """One token for each image -> as many as it takes."""
        found, placed, done = list[int](), list[Placed](), 0
        for start, (grid, image, sha256) in zip(starts, images, strict=True):
            found += ids[done:start]
            count, done = tokens_of(grid, self.processor.merge), start + 1
            if len(found) < most < len(found) + count:
                return self._without("with images that the end of a row would cut")
            placed += [(len(found), grid, image, sha256)] * (len(found) < most)
            found += [self.processor.token_id] * count
        return [*found, *ids[done:]][:most], placed

    def _without(self, reason: str) -> tuple[list[int], list[Placed]]:
        self.left_out[reason] += 1
        return [], []

    def _text(self, document: Document, images: bool = False) -> str | None:
        """What is cut into tokens; None where it is left out."""
        if document.messages:
            return self._conversation(document, images)
        if not images:
            return document.text
        mark = "".join(map(self.tokenizer.convert_ids_to_tokens, self.processor.framed))
        places = len(IMAGE_MARK.findall(document.text))
        if places in (0, len(document.images)):
            front = mark * len(document.images) if not places else ""
            return front + IMAGE_MARK.sub(lambda _: mark, document.text)
        self.left_out["with other images than places for them"] += 1
        return None

    def _ids(self, text: str, most: int | None = None) -> list[int]:
        # verbose: the tokenizer would warn that a document is longer than the model's context
        cut = {} if most is None else {"truncation": True, "max_length": most}
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False, **cut)["input_ids"])

    def _conversation(self, document: Document, images: bool = False) -> str | None:
        if not self.tokenizer.chat_template:
            raise CheckpointError(
                f"the tokenizer in {self.folder} has no chat template, and {document.name} is a conversation",
                "copy chat_template.jinja of the base checkpoint there, or calibrate on plain text",
            )
        try:
            return render(self.tokenizer, document, self.thinking, images)
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
        images: by row.
    """

    ids: array[int] = field(default_factory=lambda: array("q"))
    starts: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    images: list[Picture] = field(default_factory=list)

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
        pictures = Pictures(tuple(self.images), reader.processor) if self.images else None
        return Rows(
            ids, documents, names, text, text_sha256, ids_sha256(ids), skipped, revision, dict(reader.left_out), pictures
        )


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
        placed: list[Placed] = []
        if reader.images == "use" and document.media:
            tokens, placed = reader.with_images(document, length)
        else:
            tokens = reader.tokens(document, length)
        if len(tokens) == length:
            taken.images += [Picture(len(taken.ids) // length, *place) for place in placed]
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
    return TextError(
        what,
        f"{fewer}shorten calibration.length, {'' if packed or reader.images == 'use' else 'pack the documents, '}or give more text",
    )


def _left_out(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count} {reason}' for reason, count in counts.items())})" if counts else ""
