"""What a run changed besides numbers: experts that are gone, tensors from another checkpoint."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qwench.result.measured import Acceptance
from qwench.result.record import Bytes, Number, Ratio, Record, Share, Tensors, Tokens, unit

Experts = Annotated[int, unit("experts")]


class PrunedLayer(Record):
    """Experts of one layer, ranked on the calibration rows."""

    component: str
    """`text`, or `mtp`, whose layers count from 0 again."""
    layer: Number
    """Which layer."""
    kept: Annotated[list[int], unit("numbers of experts, from 0")]
    """Numbers in the source of those that stayed; they are numbered 0, 1, 2 ... in the release."""
    tokens: list[Tokens]
    """How many were sent to each expert of the source."""
    saliency: Annotated[list[float], unit("router weight x norm")]
    """REAP's, of each expert of the source: mean over its tokens of router weight times norm of its output; 0 where there was no token. Whatever the recipe ranked by."""
    saliency_kept: Share
    """Of the sum of saliencies, what stayed."""
    contribution_kept: Share
    """Of the sum over all tokens of router weight times norm, what stayed."""
    not_finite: Annotated[int, unit("outputs")] = 0
    """Outputs of experts that were not counted because they were NaN or infinite."""
    error: Ratio | None = None
    """Relative squared error of what the layer's experts add to held-out calibration tokens once some are gone; null where no repair was tried."""
    error_repaired: Ratio | None = None
    """The same after the repair."""
    repaired: Tensors = 0
    """Down projections that the repair changed."""

    @property
    def label(self) -> str:
        return f"{'mtp ' if self.component == 'mtp' else ''}layer {self.layer}"


class PruningFacts(Record):
    """Which experts a release does without."""

    criterion: str
    """What they were ranked by: `reap`, `frequency`, `weight_sum`, `norm_mean`, `norm_sum`, `contribution_sum`, `norm_max` or `random`."""
    before: Experts
    """In each layer of the source."""
    after: Experts
    """In each layer of the release."""
    top_k: Experts
    """That a token is sent to, before and after."""
    layers: list[PrunedLayer]
    """Every layer with experts, the MTP head's behind the trunk's."""
    warnings: list[str] = Field(default_factory=list)
    """Experts that fewer tokens reached than the recipe asks for, by layer."""


class Distance(Record):
    """How far a matrix of the source is from the donor's."""

    relative_rms: Ratio
    """|| source - donor || / || donor ||, Frobenius norms over the rows that were compared."""
    rows: Annotated[int, unit("rows of the matrix")]
    """That were compared."""
    of_rows: Annotated[int, unit("rows of the matrix")]
    """That there are."""


class GraftFacts(Record):
    """What was grafted, and how well it fits; null where the donor's file or tokenizer was not at hand."""

    donor: str
    """The checkpoint that the tensors come from: hub id or folder."""
    revision: str | None = None
    """Its commit, where it came from the hub."""
    components: list[str]
    """`mtp`, `vision`."""
    tensors: Tensors
    """That were taken."""
    bytes: Bytes
    """Of those tensors."""
    embedding: Distance | None = None
    """Distance of the source's embedding from the one that the donor's MTP head learned on."""
    head: Distance | None = None
    """The same of the lm_head."""
    vocabulary_sha256: tuple[str, str] | None = None
    """SHA-256 of all tokens and ids in order of ids: source, donor."""
    differing_tokens: Tokens | None = None
    """That have another id on the other side, or none."""
    differing_ids: Annotated[list[int], unit("token ids")] = Field(default_factory=list)
    """The first of those ids."""
    acceptance_source: Acceptance | None = None
    """Of the head on the source's trunk, unquantized."""
    acceptance_donor: Acceptance | None = None
    """Of the head on its own trunk, on the same rows."""
    notes: list[str] = Field(default_factory=list)
    """What else differs, and what could not be measured."""
