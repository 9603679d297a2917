"""Does an engine load a finished folder, all of it, and mean the same by it as we do?

Three questions, in this order:

1. Did every stored tensor reach the engine's memory, and was none of that memory left as it was? Names that nobody reads, and parameters that nobody wrote, are
   how a release breaks in silence.
2. Do its log-probabilities agree with our own reading of the file (`qwench.models.run` over `qwench.formats.release`, in float32) on held-out text?
3. Does it take images where the tower was kept, and does it draft with the MTP head?

Agreement is the mean over positions of KL(ours || engine) in nats. Where the engine gives only its k most likely tokens, all others are one outcome of
the same distribution: a lower bound of the whole, and tight where k tokens hold most of the mass.

An engine that computes in bfloat16 differs from float32 by rounding alone, and a router that stands between two experts may fall to the other side: `TOLERANCES` says
how much, and what was measured on unquantized checkpoints, where there is nothing but rounding. Rounding weights to 4 bits costs 0.01 to 0.1.

Where an engine is known to read a format wrongly, or computes it with a stand-in, the outcome is `loads` at best, and the notes say why: the numbers are
compared where that means something and never excused by a tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import TensorSource
from qwench.engines import ENGINES, Answer, Request
from qwench.errors import EngineError, suggestion
from qwench.formats.adapter import Adapter, Corrected
from qwench.formats.release import Release, open_source
from qwench.models import map_of
from qwench.models.map import ModelMap
from qwench.models.run import Trunk
from qwench.result import Verification
from qwench.steps.checks.known_readers import wrong_reader
from qwench.steps.checks.rounded_inputs import NOISE, HeldInBfloat16, drift_of_bfloat16, rounds_inputs

TOLERANCES: dict[tuple[str, bool], float] = {
    ("float32", False): 2e-4,
    ("float32", True): 1e-3,
    ("bfloat16", False): 1e-3,
    ("bfloat16", True): 5e-3,
}
"""Mean KL in nats that counts as agreement, by what the engine computes in and whether the model has experts; see docs/engines.md for what was measured."""

WIDE = ("transformers", "gptqmodel", "auto-round")
FLOAT32_PARAMETERS = 2_000_000_000
"""Engines that can, compute models of up to so many parameters in float32, where nothing but a wrong reading can make a difference."""

TOP_K = 20
DOCUMENTS, LENGTH = 4, 128
DRAFTS = 2
"""Tokens that the MTP head drafts at a time, where an engine speculates."""


@dataclass(frozen=True)
class Comparison:
    """Our reading against an engine's: `mean_kl` over `positions`, and the largest difference of a log-probability that the engine gave."""

    positions: int
    mean_kl: float
    max_abs_logprob: float


def verify(
    folder: Path, engine: str = "transformers", rows: list[list[int]] | None = None, *,
    dtype: str | None = None, threads: int = 0, timeout: float = 3600.0, adapter: Path | None = None,
) -> Verification:  # fmt: skip
    """Load a folder in an engine and hold the engine's numbers against ours.

    Args:
        folder: a release, or any checkpoint.
        engine: a name in `ENGINES`.
        rows: token ids to compare on, equally long; held-out text by default.
        dtype: what the engine computes in; by default bfloat16, and float32 for engines that can, with models small enough.
        threads: CPU threads of the engine; 0 for as many as torch uses here.
        timeout: seconds until the engine is given up.
        adapter: a folder with corrections (EoRA) that both sides add to the release's weights; the engine drafts nothing then.

    Raises:
        EngineError: no such engine, it is not installed, or it died without an answer.
        CheckpointError: we cannot read the folder ourselves, or the adapter is for another release.
    """
    if engine not in ENGINES:
        raise EngineError(
            f"there is no engine {engine!r}{suggestion(engine, ENGINES)}",
            f"use one of {', '.join(ENGINES)}",
        )
    checkpoint = Checkpoint.open(folder)
    source = _corrected(open_source(folder, corrected=False), adapter)
    network = map_of(source)
    request = Request(
        folder=folder.resolve(),
        rows=rows or _held_out(folder),
        top_k=TOP_K if engine == "vllm" else None,
        dtype=dtype or _dtype(engine, network),
        speculate=DRAFTS if engine == "vllm" and network.has_mtp and adapter is None else 0,
        adapter=adapter and adapter.resolve(),
        threads=threads or torch.get_num_threads(),
        timeout=timeout,
    )
    answer = ENGINES[engine](request)
    _count_corrections(source, answer)
    wrong = wrong_reader(engine, checkpoint, answer.uninitialized)
    comparable = answer.logprobs and not answer.refused and not wrong
    compared = compare(Trunk(_as_held(source, request), network), request.rows, answer) if comparable else None
    least = _drift(source, network, request, answer) if comparable else 0.0
    found = judge(engine, request, network, checkpoint, answer, compared, wrong, least)
    return found.model_copy(update={"adapter": adapter.resolve().name}) if adapter else found


def _as_held(source: TensorSource, request: Request) -> TensorSource:
    """A release as an engine holds it: where layers round their inputs, weights that were decoded to bfloat16 make a difference (see `rounded_inputs`)."""
    rounded = request.dtype == "float32" and rounds_inputs(source)
    return HeldInBfloat16(source) if rounded and isinstance(source, Release) else source


def _drift(source: TensorSource, network: ModelMap, request: Request, answer: Answer) -> float:
    """The tolerance that a release needs which rounds inputs, in an engine that computes in bfloat16; 0 for all others."""
    if request.dtype == "float32" or not rounds_inputs(source):
        return 0.0
    drift = drift_of_bfloat16(source, network, request.rows)
    answer.notes.append(
        f"inputs are rounded, and bfloat16 puts some on another step than float32: our own reading in bfloat16 is {drift:.2e} nats from that in float32, "
        f"the engine may be {NOISE:g} times that"
    )
    return NOISE * drift


def _corrected(source: TensorSource, adapter: Path | None) -> TensorSource:
    """A release with its corrections, where there are any. Raises CheckpointError where they are not for it."""
    return source if adapter is None else Corrected(source, Adapter(adapter))


def _count_corrections(source: TensorSource, answer: Answer) -> None:
    """Note how many corrections the engine added; one that added fewer than there are has not run this release."""
    if isinstance(source, Corrected) and not answer.refused:
        there, taken = len(source.adapter.modules), len(answer.corrected)
        if taken == there:
            answer.notes.append(f"corrections of {there} modules were added on both sides")
        else:
            answer.refused = f"the adapter corrects {there} modules, {taken} of them reached the engine's"


def _held_out(folder: Path) -> list[list[int]]:
    from qwench.stream.rows import held_out_rows

    return [[int(i) for i in row] for row in held_out_rows(folder, documents=DOCUMENTS, length=LENGTH).ids]


def _dtype(engine: str, network: ModelMap) -> str:
    parameters = sum(int(np.prod(slot.shape)) for slot in network.slots())
    return "float32" if engine in WIDE and parameters <= FLOAT32_PARAMETERS else "bfloat16"


def compare(trunk: Trunk, rows: list[list[int]], answer: Answer) -> Comparison:
    """Our log-probabilities of each row against the engine's."""
    divergences, largest = [], 0.0
    for ours, (tokens, theirs) in zip(our_logprobs(trunk, rows), answer.logprobs, strict=True):
        divergence, difference = row_divergence(ours, tokens, theirs)
        divergences.append(divergence)
        largest = max(largest, difference)
    found = np.concatenate(divergences)
    return Comparison(len(found), float(found.mean()), largest)


def our_logprobs(trunk: Trunk, rows: list[list[int]]) -> Iterator[Tensor]:
    """For each row, log-probabilities [length - 1, V] of what comes after each of its positions, float32: our own reading of the file."""
    hidden = trunk.forward(torch.tensor(rows))
    for row in hidden:
        yield torch.log_softmax(trunk.logits(row[:-1]).float(), -1)


def row_divergence(
    ours_TV: Tensor, tokens_TK: NDArray[np.int64] | None, theirs_TK: NDArray[np.float32]
) -> tuple[NDArray[np.float64], float]:
    """KL(ours || theirs) at each position, and the largest |difference| of a log-probability.

    With K tokens of V, the others count as one outcome with the rest of the mass on each side.
    """
    theirs = torch.from_numpy(theirs_TK).double()
    ours = ours_TV.double() if tokens_TK is None else ours_TV.double().gather(1, torch.from_numpy(tokens_TK))
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    if tokens_TK is not None and tokens_TK.shape[1] < ours_TV.shape[1]:
        our_rest, their_rest = ((1 - side.exp().sum(-1)).clamp_min(1e-7) for side in (ours, theirs))
        kl = kl + our_rest * (our_rest / their_rest).log()
    return kl.numpy(), float((ours - theirs).abs().max())


def judge(
    engine: str, request: Request, network: ModelMap, checkpoint: Checkpoint, answer: Answer, compared: Comparison | None,
    wrong: str | None, least_tolerance: float = 0.0,
) -> Verification:  # fmt: skip
    """The record of it all; `wrong`: why this engine's numbers for this folder mean nothing; `least_tolerance`: what is granted in any case."""
    taken = set(answer.consumed)
    unconsumed = [name for name in checkpoint.tensors if name not in taken]
    lost = [name for name in unconsumed if name not in answer.ignored]
    unexplained = [name for name in (*lost, *answer.uninitialized) if not (wrong and ".experts." in name)]
    tolerance = max(least_tolerance, TOLERANCES[request.dtype, any(slot.expert is not None for slot in network.slots())])
    return Verification(
        engine=engine,
        version=answer.version,
        outcome=_outcome(answer, compared, tolerance, wrong, unexplained),
        consumed=len(taken),
        unconsumed=unconsumed,
        uninitialized=answer.uninitialized,
        positions=compared.positions if compared else 0,
        mean_kl=compared.mean_kl if compared else None,
        max_abs_logprob=compared.max_abs_logprob if compared else None,
        tolerance_kl=tolerance,
        generated=_text(request.folder, answer.generated),
        image=_image(answer),
        speculation=_speculation(answer),
        notes=_notes(engine, request, answer, wrong, lost),
    )


def _outcome(answer: Answer, compared: Comparison | None, tolerance: float, wrong: str | None, unexplained: list[str]) -> str:
    if answer.refused or unexplained:
        return "failed"
    if wrong:
        return "loads"
    if compared is None:
        return "failed"
    if not compared.mean_kl <= tolerance:  # NaN is not agreement
        return "disagrees"
    if answer.image is not None and not answer.image["differs"]:
        return "disagrees"
    return "loads" if answer.stand_ins else "agrees"


def _text(folder: Path, tokens: list[int]) -> str | None:
    """Generated tokens as text where the folder has a tokenizer, as numbers where not."""
    if not tokens:
        return None
    from qwench.stream.rows import load_tokenizer

    if (folder / "tokenizer.json").is_file():
        return str(load_tokenizer(folder).decode(tokens))
    return " ".join(map(str, tokens))


def _image(answer: Answer) -> str | None:
    if answer.image is None:
        return None
    what = "changes what it says" if answer.image["differs"] else "changes NOTHING: the tower is not heard"
    return f"an image is {answer.image['tokens']} tokens; another image {what}"


def _speculation(answer: Answer) -> dict[str, float] | None:
    if answer.speculation is None:
        return None
    counted = answer.speculation
    flat = {name: float(counted[name]) for name in ("drafts", "drafted", "accepted")}
    return flat | {f"accepted at {i}": float(n) for i, n in enumerate(counted["accepted_by_position"], start=1)}


def _notes(engine: str, request: Request, answer: Answer, wrong: str | None, lost: list[str]) -> list[str]:
    notes = [wrong] if wrong else []
    if answer.refused:
        notes.append(f"{engine} refused: {answer.refused}")
    if answer.stand_ins:
        notes.append(
            f"numerics not proved on this machine: {engine} has no CPU kernel for {', '.join(answer.stand_ins)}. What its loader made of the file "
            "was decoded and multiplied by a stand-in: names, fusing and scales are proved, the kernel is not."
        )
    if lost:
        notes.append(f"{len(lost)} stored tensors reached nothing: {', '.join(lost[:4])}{' ...' if len(lost) > 4 else ''}")
    if answer.ignored:
        reasons = sorted(set(answer.ignored.values()))
        notes.append(f"{len(answer.ignored)} tensors are not read by this engine: {'; '.join(reasons)}")
    return [*notes, f"{engine} computed in {request.dtype}, we in float32", *answer.notes]
