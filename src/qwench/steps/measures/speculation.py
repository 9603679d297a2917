"""Let a checkpoint write with drafts of its own MTP head, for the record: on the first tokens of the rows that it is evaluated on."""

from __future__ import annotations

import torch

from qwench.checkpoint.source import TensorSource
from qwench.evaluation.speculation import SpeculationReport, speculate
from qwench.models import ModelMap
from qwench.models.place import CPU, Place
from qwench.result import Estimate, Speculation
from qwench.stream.rows import Rows, ids_sha256

DRAFTS = 2
"""Tokens drafted in each round, as many as engines are asked for when they verify a release."""
PROMPTS, PROMPT_LENGTH = 16, 64
"""Rows that are written on from, at most, and tokens of each that are read before."""


def measured_speculation(
    source: TensorSource, map: ModelMap, rows: Rows, tokens: int, place: Place = CPU, drafts: int = DRAFTS
) -> Speculation | None:
    """Greedy speculative decoding after the beginnings of some rows; None where the checkpoint has no MTP head.

    Args:
        rows: at least 2.
        tokens: how many are generated after each.

    Raises:
        CheckpointError: tensors that cannot be read, or logits that are not finite.
    """
    if not map.has_mtp:
        return None
    prompts = rows.ids[:PROMPTS, :PROMPT_LENGTH]
    report = speculate(source, map, prompts.tolist(), tokens=tokens, drafts=drafts, dtype=place.dtype, device=place.device)
    return None if not report.rounds else recorded(report, ids_sha256(prompts), tokens)


def recorded(report: SpeculationReport, prompts_sha256: str, tokens: int) -> Speculation:
    """The record of a report on at least 2 prompts, equally long."""
    length = report.length_mean()
    return Speculation(
        drafts=report.drafts,
        prompts=len(report.prompts),
        prompt_length=len(report.prompts[0]),
        prompts_sha256=prompts_sha256,
        tokens=tokens,
        temperature=report.sampling.temperature,
        top_k=report.sampling.top_k,
        top_p=report.sampling.top_p,
        seed=report.seed,
        rounds=report.rounds,
        drafted=report.drafted,
        accepted=report.accepted,
        by_position=[Estimate(mean=m.mean, standard_error=m.standard_error) for m in report.acceptance_means()],
        mean_length=Estimate(mean=length.mean, standard_error=length.standard_error),
        seconds_one=report.costs.one,
        seconds_window=report.costs.window,
        seconds_head=report.costs.head,
        unsteadiness=report.costs.unsteadiness,
        speedup=report.speedup,
        threads=torch.get_num_threads(),
    )
