"""Measure a release against its source, on the same rows of tokens.

Divergence, perplexity, agreement, error and divergence after every layer, and what the MTP head's drafts are worth on both sides: one pass through both models, block by
block, each read by our own forward. A release is decoded as it is read: what is measured is the file, not what was meant to be in it.

A release with low-rank corrections (EoRA) is read twice in the same pass, with them and without: not every engine adds them.

Where it is asked for, all of them also write on from the rows' beginnings with drafts of their heads (`steps.measures.speculation`): what the drafts are worth when nobody holds the
text's hand. That is token by token, and takes far longer than all the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qwench.checkpoint.source import TensorSource
from qwench.errors import PlanError, TextError
from qwench.evaluation.acceptance import DRAFTS, acceptance, accepted, draft_tokens
from qwench.evaluation.divergence import TokenMeasures, histogram, measure_tokens
from qwench.evaluation.lens import divergence_by_layer, lens_positions
from qwench.evaluation.lockstep import Progress, Read, read_in_lockstep
from qwench.evaluation.statistics import Mean, clustered_mean, exponential, quantile
from qwench.formats.adapter import Corrected
from qwench.formats.release import open_source
from qwench.machine import peak_rss
from qwench.models import ModelMap, map_of
from qwench.models.mtp import MtpHead
from qwench.models.place import CPU, Place, peak_vram
from qwench.models.run import Trunk
from qwench.result import Acceptance, Divergence, Estimate, Evaluation, Figures, LayerDivergence, Speculation
from qwench.steps.measures.speculation import measured_speculation
from qwench.stream.rows import TOKENIZER_FILES, Rows, load_tokenizer

RELEASE, WITHOUT = "release", "release without corrections"


@dataclass(frozen=True)
class Side:
    """One reading of one model: where its tensors are, what they are, and what runs them."""

    source: TensorSource
    map: ModelMap
    trunk: Trunk


@dataclass(frozen=True)
class Asked:
    """What every reading is measured on; `positions`: those that are looked at after every layer (see `evaluation.lens`)."""

    rows: Rows
    positions: Tensor
    speculate: int
    place: Place


def evaluate(
    release: Path | TensorSource,
    source: Path | TensorSource,
    rows: Rows,
    progress: Callable[[Progress], None] | None = None,
    place: Place = CPU,
    speculate: int = 0,
) -> Evaluation:
    """Everything that a card says about quality.

    Args:
        release: the folder of the release; or what reads it, where that is no folder of safetensors (a GGUF file).
        source: the folder of what it was made from, or what reads it.
        rows: at least 2 rows, in the tokens of both.
        progress: called after every decoder layer.
        place: where to compute, and in which numbers.
        speculate: tokens to write after each row's beginning, with drafts of the MTP head; 0 for none.

    Raises:
        CheckpointError: a folder that cannot be read, or hidden states that are not finite.
        PlanError: the two have different vocabularies, tokenizers, depths or widths; says all of it.
        TextError: fewer than 2 rows, or rows too short to draft on.
    """
    begun = time.monotonic()
    check_rows(rows)
    original, opened = _side(_opened(source), place), _opened(release)
    readings = {RELEASE: _side(opened, place)}
    check_same_tokens((original.source, opened), (original.map, readings[RELEASE].map))
    if isinstance(opened, Corrected):
        readings[WITHOUT] = _side(opened.source, place)
    asked = Asked(rows, lens_positions(*rows.ids.shape), speculate, place)
    trunks = {name: side.trunk for name, side in readings.items()}
    found = read_in_lockstep(original.trunk, trunks, rows.ids, len(original.map.blocks), progress, asked.positions)
    compared = {name: _compared(original, found.source, side, found.releases[name], asked) for name, side in readings.items()}
    same, figures = compared[RELEASE]
    return Evaluation(
        **dict(figures),
        without_corrections=compared[WITHOUT][1] if WITHOUT in compared else None,
        corrections=len(opened.adapter.modules) if isinstance(opened, Corrected) else 0,
        text=rows.text,
        text_sha256=rows.text_sha256,
        ids_sha256=rows.ids_sha256,
        documents=len(rows.ids),
        length=rows.length,
        tokens=len(same.divergence),
        compute_dtype=place.says[1],
        device=place.says[0],
        perplexity_source=_estimate(exponential(clustered_mean(same.loss_source, same.documents))),
        acceptance_source=measured_acceptance(original.trunk, found.source.normed, same.greedy_source, rows.ids),
        speculation_source=_speculation(original, asked),
        seconds=time.monotonic() - begun,
        peak_rss=peak_rss(),
        peak_vram=peak_vram(place),
    )


def _opened(place: Path | TensorSource) -> TensorSource:
    return open_source(place) if isinstance(place, Path) else place


def _side(source: TensorSource, place: Place) -> Side:
    map = map_of(source)
    return Side(source, map, Trunk(source, map, place.dtype, place.device))


def _compared(original: Side, source: Read, side: Side, release: Read, asked: Asked) -> tuple[TokenMeasures, Figures]:
    """One reading of the release against the source: token by token, and for the record. Lets go of the release's lm_head."""
    ids, heads = asked.rows.ids, (original.trunk.logits, side.trunk.logits)
    measures = measure_tokens(source.normed, release.normed, *heads, ids, original.trunk.vocabulary)
    documents = measures.documents
    figures = Figures(
        divergence=summarized_divergence(measures),
        perplexity_release=_estimate(exponential(clustered_mean(measures.loss_release, documents))),
        loss_increase=_estimate(clustered_mean(measures.loss_release - measures.loss_source, documents)),
        top1_agreement=_estimate(clustered_mean(measures.agrees, documents)),
        hidden_error_by_layer=release.errors,
        own_error_by_layer=release.own,
        divergence_by_layer=_by_layer(original, source, side, release, asked),
        acceptance_release=measured_acceptance(side.trunk, release.normed, measures.greedy_release, ids),
        speculation_release=_speculation(side, asked),
    )
    return measures, figures


def _by_layer(original: Side, source: Read, side: Side, release: Read, asked: Asked) -> LayerDivergence:
    """The divergence after every layer, with standard errors over the rows that the positions lie in."""
    heads = original.trunk.logit_parts, side.trunk.logit_parts
    found = divergence_by_layer(source.by_layer, release.by_layer, *heads)
    documents = asked.positions // asked.rows.length
    return LayerDivergence(positions=len(documents), by_layer=[_estimate(clustered_mean(layer, documents)) for layer in found])


def _speculation(side: Side, asked: Asked) -> Speculation | None:
    if not asked.speculate:
        return None
    return measured_speculation(side.source, side.map, asked.rows, asked.speculate, asked.place)


def summarized_divergence(measures: TokenMeasures) -> Divergence:
    """The record of the per-token divergences."""
    edges, counts = histogram(measures.divergence)
    return Divergence(
        mean=_estimate(clustered_mean(measures.divergence, measures.documents)),
        p99=quantile(measures.divergence, 0.99),
        p999=quantile(measures.divergence, 0.999),
        max=float(measures.divergence.max()),
        histogram_edges=edges,
        histogram_counts=counts,
    )


def measured_acceptance(trunk: Trunk, normed: Tensor, greedy: Tensor, ids: Tensor) -> Acceptance | None:
    """How many drafts of a checkpoint's MTP head its own trunk accepts; None where it has no head. Lets go of the trunk's lm_head afterwards.

    Args:
        trunk: the trunk.
        normed: its hidden states after the final norm [rows, length, hidden].
        greedy: int64 [rows, length], its most likely next token after every position.
        ids: int64 [rows, length].
    """
    if not trunk.map.has_mtp:
        trunk.free()
        return None
    head = MtpHead(trunk.source, trunk.map, trunk.dtype, trunk.device)
    drafts = draft_tokens(trunk, head, normed, ids)
    trunk.free()
    return Acceptance(by_position=[_estimate(mean) for mean in acceptance(accepted(greedy, drafts))])


def check_rows(rows: Rows) -> None:
    """Raise TextError before any work where the rows can give no standard error or no drafts."""
    if len(rows.ids) < 2:
        raise TextError(f"{len(rows.ids)} row gives no standard error", "evaluate on at least 2 documents")
    if rows.length <= DRAFTS:
        raise TextError(
            f"rows of {rows.length} tokens are too short for {DRAFTS} drafts", f"ask for at least {DRAFTS + 1} tokens"
        )


def check_same_tokens(sources: tuple[TensorSource, TensorSource], maps: tuple[ModelMap, ModelMap]) -> None:
    """Raise PlanError where source and release cannot be compared position by position.

    The same id must mean the same token. Tokenizers are compared where both folders hold one; else the sizes of the embeddings have to do.
    """
    mend = "compare a release with the checkpoint that it was made from"
    (vocabulary, width), (other_vocabulary, other_width) = (m.other("embed").shape for m in maps)
    depth, other_depth = (len(m.blocks) for m in maps)
    complaints = [
        (f"the source has {number} {what}, the release {other}", mend)
        for what, number, other in (
            ("tokens in its vocabulary", vocabulary, other_vocabulary),
            ("channels", width, other_width),
            ("decoder layers", depth, other_depth),
        )
        if number != other
    ]
    differing = differing_tokens(sources[0].folder, sources[1].folder)
    if differing:
        complaints.append((f"the tokenizers differ in {differing} tokens", mend))
    if complaints:
        raise PlanError(complaints)


def differing_tokens(folder: Path, other: Path) -> int:
    """How many tokens have another id in the other folder's tokenizer, or none; 0 where either folder holds no tokenizer."""
    if not all(any((f / name).is_file() for name in TOKENIZER_FILES) for f in (folder, other)):
        return 0
    ours, theirs = (set(load_tokenizer(f).get_vocab().items()) for f in (folder, other))
    return len({token for token, _ in ours ^ theirs})


def _estimate(mean: Mean) -> Estimate:
    return Estimate(mean=mean.mean, standard_error=mean.standard_error)
