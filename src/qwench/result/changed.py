"""What a run changed besides numbers: experts that are gone, tensors from another checkpoint."""

from __future__ import annotations

from pydantic import Field

from qwench.result.measured import Acceptance
from qwench.result.record import Record


class PrunedLayer(Record):
    """Experts of one layer, ranked on the calibration rows.

    Attributes:
        component: `text`, or `mtp`, whose layers count from 0 again.
        kept: numbers in the source of those that stayed; they are numbered 0, 1, 2 ... in the release.
        tokens: how many were sent to each expert.
        saliency: REAP's, of each expert: mean over its tokens of router weight times norm of its output; 0 where there was no token. Whatever the recipe ranked by.
        saliency_kept: share of the sum of saliencies that stayed.
        contribution_kept: share of the sum over all tokens of router weight times norm that stayed.
        not_finite: outputs of experts that were not counted because they were NaN or infinite.
        error: relative squared error of what the layer's experts add to held-out calibration tokens once some are gone; None where no repair was tried.
        error_repaired: the same after the repair.
        repaired: down projections that the repair changed.
    """

    component: str
    layer: int
    kept: list[int]
    tokens: list[int]
    saliency: list[float]
    saliency_kept: float
    contribution_kept: float
    not_finite: int = 0
    error: float | None = None
    error_repaired: float | None = None
    repaired: int = 0

    @property
    def label(self) -> str:
        return f"{'mtp ' if self.component == 'mtp' else ''}layer {self.layer}"


class PruningFacts(Record):
    """Which experts a release does without.

    Attributes:
        criterion: that they were ranked by.
        before, after: experts in each layer.
        top_k: experts that a token is sent to, before and after.
        layers: the MTP head's behind the trunk's.
        warnings: experts that fewer tokens reached than the recipe asks for, by layer.
    """

    criterion: str
    before: int
    after: int
    top_k: int
    layers: list[PrunedLayer]
    warnings: list[str] = Field(default_factory=list)


class Distance(Record):
    """How far a matrix of the source is from the donor's: || source - donor || / || donor || over `rows` of `of_rows` rows."""

    relative_rms: float
    rows: int
    of_rows: int


class GraftFacts(Record):
    """What was grafted, and how well it fits; None where the donor's file or tokenizer was not at hand.

    Attributes:
        tensors, bytes: what was taken.
        embedding, head: distance of the source's matrices from those that the donor's MTP head learned on.
        vocabulary_sha256: of source and donor: all tokens and ids in order of ids.
        differing_tokens: tokens that have another id on the other side, or none; `differing_ids` are the first of those ids.
        acceptance_source: of the head on the source's trunk.
        acceptance_donor: of the head on its own trunk, on the same rows.
        notes: what else differs, and what could not be measured.
    """

    donor: str
    revision: str | None = None
    components: list[str]
    tensors: int
    bytes: int
    embedding: Distance | None = None
    head: Distance | None = None
    vocabulary_sha256: tuple[str, str] | None = None
    differing_tokens: int | None = None
    differing_ids: list[int] = Field(default_factory=list)
    acceptance_source: Acceptance | None = None
    acceptance_donor: Acceptance | None = None
    notes: list[str] = Field(default_factory=list)
