"""Speculation, ours beside vLLM's: the same demo checkpoint, the same prompts, as many tokens and drafts, greedy.

    python -m benchmarks.speculation [--models dense moe] [--drafts 2] [--tokens 64]

Our reference decoder in float32 and in vLLM's bfloat16, and vLLM's own counters. Rounding parts texts at near ties, and from there on the two count on different texts: their
difference is held against the standard error over prompts. The table goes to `benchmarks/results/speculation-*.json` and, as Markdown, to standard output.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.engines import ENGINES, Request
from qwench.errors import EngineError
from qwench.evaluation.speculation import speculate
from qwench.models import map_of
from qwench.stream.rows import held_out_rows

PROMPTS, LENGTH = 16, 64


def ours(folder: Path, prompts: list[list[int]], tokens: int, drafts: int, dtype: torch.dtype) -> dict[str, Any]:
    """What our decoder counts, and what its steps cost."""
    source = Checkpoint.open(folder)
    found = speculate(source, map_of(source), prompts, tokens=tokens, drafts=drafts, dtype=dtype)
    return {
        "who": f"ours, {str(dtype).removeprefix('torch.')}", "rounds": found.rounds, "accepted": found.accepted,
        "acceptance": found.acceptance, "standard_error": [mean.standard_error for mean in found.acceptance_means()],
        "tokens_per_forward": found.mean_length, "seconds_one": found.costs.one, "seconds_window": found.costs.window,
        "seconds_head": found.costs.head, "speedup": found.speedup,
    }  # fmt: skip


def theirs(folder: Path, prompts: list[list[int]], tokens: int, drafts: int) -> dict[str, Any]:
    """vLLM's counters. Raises EngineError where it refuses."""
    request = Request(
        folder.resolve(), prompts, generate=tokens, top_k=1, image=False, speculate=drafts, threads=torch.get_num_threads()
    )
    answer = ENGINES["vllm"](request)
    if answer.speculation is None:
        raise EngineError(f"vLLM counted nothing: {answer.refused}", "see its log")
    counted = answer.speculation
    return {
        "who": f"vLLM {answer.version}, bfloat16", "rounds": counted["drafts"], "accepted": counted["accepted"],
        "acceptance": [count / counted["drafts"] for count in counted["accepted_by_position"]],
        "tokens_per_forward": 1 + counted["accepted"] / counted["drafts"],
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | who | rounds | accepted | accepted at 1, 2 ... | tokens per forward |", "|---|---|--:|--:|--:|--:|"]
    for r in rows:
        shares = ", ".join(f"{share:.3f}" for share in r["acceptance"])
        lines.append(
            f"| {r['model']} | {r['who']} | {r['rounds']:.0f} | {r['accepted']:.0f} | {shares} | {r['tokens_per_forward']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speculation: our counters beside vLLM's.")
    parser.add_argument("--models", nargs="+", default=["dense", "moe"])
    parser.add_argument("--drafts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    results, rows = Path(__file__).parent / "results", []
    for which in arguments.models:
        folder = checkpoint(which)
        prompts = held_out_rows(folder, PROMPTS, LENGTH).ids.tolist()
        asked = (folder, prompts, arguments.tokens, arguments.drafts)
        found = [ours(*asked, torch.float32), ours(*asked, torch.bfloat16), theirs(*asked)]
        rows += [{"model": which} | side for side in found]
        (results / f"speculation-{which}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
