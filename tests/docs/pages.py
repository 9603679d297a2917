"""The pages of docs/guide as a test reads them: what a reader would type, what he is shown, and the files that he is given.

    ```sh         commands; run one after the other, all blocks of a page in one shell and one folder
    ```text       what the commands before show, line by line; numbers may be others, lines may lie between
    ```yaml       a file, whose name is the comment in its first line
    ```python     the same
    ```diff       a file's path, then lines that go (-) and lines that come in their place (+)

A comment before a block says why it is not run (`<!-- not run here: needs vLLM -->`): its commands are checked all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "guide"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run here: (.+) -->\n$")
NUMBER = re.compile(r"\d[\d,.]*(e[+-]?\d+)?")
HASH = re.compile(r"\b[0-9a-f]{16}\b")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        kind: the word behind the fence.
        line: of the page, to be found again.
        skipped: why it is not run; empty where it is.
    """

    kind: str
    text: str
    line: int
    skipped: str = ""

    @property
    def file(self) -> str:
        """The file that a block is, from the comment in its first line."""
        first = self.text.splitlines()[0]
        assert first.startswith("# ") and " " not in first[2:], f"line {self.line}: a file's block begins with its name"
        return first[2:]


def pages() -> list[Path]:
    """The pages that are read in order."""
    return sorted(GUIDE.glob("[0-9]-*.md"))


def blocks(page: Path) -> Iterator[Block]:
    """Every block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        reason = NOT_RUN.search(text[: match.start()])
        yield Block(match[1], match[2], text[: match.start()].count("\n") + 1, reason[1] if reason else "")


def shape(line: str) -> str:
    """A line without its numbers, hashes and widths of columns."""
    return " ".join(NUMBER.sub("0", HASH.sub("0", line)).split())


def missing(shown: str, said: str) -> list[str]:
    """Lines of a page that did not come, in this order; a line may go on longer than the page shows."""
    left, lost = [shape(line) for line in said.splitlines()], list[str]()
    for line in shown.splitlines():
        at = next((i for i, found in enumerate(left) if found.startswith(shape(line))), None)
        if at is None:
            lost.append(line)
        else:
            left = left[at + 1 :]
    return lost
