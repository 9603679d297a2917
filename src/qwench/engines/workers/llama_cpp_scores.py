"""What llama.cpp gives the ends of rows: `python llama_cpp_scores.py FOLDER`, with `request.json` {path, rows, starts, threads} in it; `answer.json` {version, scores} comes back.

Of each row the tokens from `starts` on are scored: (sum of their log-probabilities in nats, whether each is the most likely one). Rows may be of any length; the
vocabulary never leaves this process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import xllamacpp  # type: ignore[import-not-found,import-untyped,unused-ignore]
from llama_cpp_library import Model  # type: ignore[import-not-found,unused-ignore]  # beside this script, which is run by path
from numpy.typing import NDArray


def score(logits: NDArray[np.float32], row: list[int], start: int) -> tuple[float, bool]:
    """(log-probability of row[start:], whether it is greedy) from the logits [length, vocabulary] of the row."""
    before, wanted = logits[start - 1 : len(row) - 1].astype(np.float64), np.array(row[start:])
    most = before.max(axis=1)
    total = most + np.log(np.exp(before - most[:, None]).sum(axis=1))
    return float((before[np.arange(len(wanted)), wanted] - total).sum()), bool((before.argmax(axis=1) == wanted).all())


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    model = Model(Path(request["path"]), max(len(row) for row in request["rows"]), request["threads"])
    scores = [score(model.logits(row), row, start) for row, start in zip(request["rows"], request["starts"], strict=True)]
    model.close()
    (folder / "answer.json").write_text(
        json.dumps({"version": f"xllamacpp {xllamacpp.__version__}", "scores": scores}), encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
