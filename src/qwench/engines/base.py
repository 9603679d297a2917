"""What is asked of an engine, and what it answers.

Engines run as processes of their own: each has its own pins of torch and transformers, some take the process down with them, and all of them keep global
state. A question goes to the process as a JSON file, the answer comes back as one; log-probabilities, which are large, lie beside it as `row<N>.npz`:

- `logprobs` float32 [length - 1, k]: entry (t, j) is the log-probability, in nats, that token `tokens[t, j]` comes after position t;
- `tokens` int64 [length - 1, k]; absent where k is the whole vocabulary, in order.

Nothing here knows how we read a file ourselves: `qwench.steps.checks.verify` brings the two together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

REQUEST, ANSWER = "request.json", "answer.json"
"""Names of the files between us and a worker, in a folder that both know."""


@dataclass(frozen=True)
class Request:
    """What an engine is to do with a folder.

    Attributes:
        folder: the checkpoint.
        rows: rows of token ids, equally long.
        generate: tokens to generate greedily after the first row.
        top_k: log-probabilities of so many most likely tokens; None for the whole vocabulary.
        dtype: what it computes in: `bfloat16` or `float32`.
        image: show it images too, where the checkpoint has a tower and a processor config.
        speculate: tokens to draft with the MTP head at each step; 0 for none.
        adapter: a folder with low-rank corrections of the checkpoint's weights, as `qwench.formats.adapter` lays it out; None for none.
        threads: CPU threads.
        timeout: seconds until it is given up.
    """

    folder: Path
    rows: list[list[int]]
    generate: int = 24
    top_k: int | None = None
    dtype: str = "bfloat16"
    image: bool = True
    speculate: int = 0
    adapter: Path | None = None
    threads: int = 1
    timeout: float = 1800.0

    def to_json(self) -> str:
        """For the worker, which runs in another folder: paths from the root."""
        paths = {
            "folder": str(self.folder.absolute()),
            "adapter": None if self.adapter is None else str(self.adapter.absolute()),
        }
        return json.dumps(asdict(self) | paths)


@dataclass
class Answer:
    """What an engine did.

    Attributes:
        version: of the engine, and of what it stands on.
        consumed: names of the stored tensors that reached a parameter.
        ignored: stored tensors that the engine leaves alone by design, and why.
        uninitialized: parameters of the engine that no stored tensor reached, in full or in part.
        corrected: modules that an adapter corrects, under the engine's names; empty where none was asked for.
        generated: token ids after the first row.
        image: tokens that one image takes, and whether another image changes what the model says; None where none was shown.
        speculation: drafted and accepted tokens, and accepted by draft position; None where it did not speculate.
        stand_ins: parts of the arithmetic that this machine has no kernel for, and that the worker computed instead, on what the engine had loaded.
        refused: why the engine did not get as far as log-probabilities.
        notes: anything else worth a line.
        logprobs: for each row, (tokens [length - 1, k] or None, log-probabilities [length - 1, k]).
    """

    version: str
    consumed: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    uninitialized: list[str] = field(default_factory=list)
    corrected: list[str] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    image: dict[str, Any] | None = None
    speculation: dict[str, Any] | None = None
    stand_ins: list[str] = field(default_factory=list)
    refused: str | None = None
    notes: list[str] = field(default_factory=list)
    logprobs: list[tuple[NDArray[np.int64] | None, NDArray[np.float32]]] = field(default_factory=list)


Engine = Callable[[Request], Answer]


def read_answer(folder: Path) -> Answer:
    """The answer that a worker left in a folder. Raises OSError or ValueError where it left none."""
    answer = Answer(**json.loads((folder / ANSWER).read_text(encoding="utf-8")))
    for path in sorted(folder.glob("row*.npz"), key=lambda p: int(p.stem.removeprefix("row"))):
        with np.load(path) as arrays:
            answer.logprobs.append((arrays.get("tokens"), arrays["logprobs"]))
    return answer
