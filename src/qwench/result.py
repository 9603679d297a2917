"""The record of a release: `result.json` in its folder. Cards, tables and plots are made from it and from nothing else.

Sizes are bytes, times are seconds. A number is in here only if it was measured on this very release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qwench import __version__
from qwench.errors import CheckpointError

FILE_NAME = "result.json"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SourceFacts(Record):
    """The checkpoint that the release was made from."""

    name: str
    revision: str | None = None
    model_type: str
    layout: str
    parameters: int
    tensors: int
    bytes: int
    license: str | None = None


class PrecisionRow(Record):
    """All weights of one component that are stored alike: `component` is attention, delta, mlp, expert, shared, embed, head, mtp, vision, other.

    `source_bytes` is what the same weights took in the source; None where nobody counted.
    """

    component: str
    stored: str
    tensors: int
    parameters: int
    bytes: int
    source_bytes: int | None = None


class FileFact(Record):
    """A file of the release, and where it is a network by itself (GGUF), what was measured on it. The classes of measurements stand below.

    Attributes:
        content: of a GGUF file: `model`, `trunk`, `mtp`, `vision`, `importance`.
        file_type: its mix: `Q4_K_M`.
        bits_per_weight: of its tensors, all of them.
        precision: its tensors by component and type.
        notes: fallbacks, and what importance did not reach.
        acceptance: what the run measured of its MTP head.
        evaluation: against the source.
    """

    name: str
    bytes: int
    content: str | None = None
    file_type: str | None = None
    bits_per_weight: float | None = None
    precision: list[PrecisionRow] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    acceptance: AcceptanceCheck | None = None
    evaluation: Evaluation | None = None


class TensorError(Record):
    """Round-trip error of one quantized weight: absolute values, and the root mean square relative to the weight's own."""

    module: str
    role: str
    layer: int | None
    scheme: str
    mean_abs: float
    max_abs: float
    relative_rms: float


class RunFacts(Record):
    """What the run that finished took.

    Attributes:
        resumed_tensors: that an earlier, unfinished run had written.
        device, compute: where layers ran, and in which numbers.
        peak_vram: GPU memory held at most; None without a GPU.
    """

    seconds: float
    peak_rss: int
    threads: int
    resumed_tensors: int = 0
    device: str = "cpu"
    compute: str = "float32"
    peak_vram: int | None = None


class CalibrationFacts(Record):
    """What a calibrated run read and what its methods said.

    Attributes:
        images: in the rows; `images_sha256` is over their bytes and places.
        left_out: records that gave no row, or no images, counted by reason.
        lost_rows: rows that were left out because their hidden states were not finite: (layer, row).
        reports: what each method said of each set of weights, by its name; fallbacks are among them.
    """

    text: str
    text_sha256: str
    ids_sha256: str
    rows: int
    length: int
    images: int = 0
    images_sha256: str | None = None
    left_out: dict[str, int] = Field(default_factory=dict)
    lost_rows: list[tuple[int, int]] = Field(default_factory=list)
    reports: dict[str, str] = Field(default_factory=dict)


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


class Estimate(Record):
    """A mean over documents with its standard error."""

    mean: float
    standard_error: float


class Divergence(Record):
    """KL(source || release) per token, nats.

    The histogram has one count fewer than edges; its lowest bin also holds everything below it, zero included.
    """

    mean: Estimate
    p99: float
    p999: float
    max: float
    histogram_edges: list[float] = Field(default_factory=list)
    histogram_counts: list[int] = Field(default_factory=list)


class Acceptance(Record):
    """Share of drafts of the MTP head that its own trunk accepts greedily, by draft position (a position counts only where all before it
    were accepted)."""

    by_position: list[Estimate]


class AcceptanceCheck(Record):
    """What the run itself measured of the MTP head before it finished: the finished bytes against what they were made from, on held-out rows.

    Attributes:
        floor: share of the source's acceptance at position 1 that the release had to reach.
        source, release: None where it was not measured.
        not_measured: why not; empty where it was.
        overridden: the release fell under the floor and was finished because somebody said so.
    """

    floor: float
    source: Acceptance | None = None
    release: Acceptance | None = None
    text: str = ""
    ids_sha256: str = ""
    documents: int = 0
    length: int = 0
    not_measured: str = ""
    overridden: bool = False


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


class Speculation(Record):
    """Speculative decoding by our reference decoder: the model writes, reads what it wrote, and its own MTP head drafts (`qwench.evaluation.decoding`).

    Attributes:
        drafts: tokens drafted in each round.
        prompts, prompt_length: rows, and the tokens of each that were read before; `prompts_sha256` is that of their token ids.
        tokens: generated after each prompt.
        temperature, top_k, top_p, seed: how tokens were chosen; temperature 0 is greedy.
        rounds, drafted, accepted: as engines count them: a round is one forward of the trunk.
        by_position: share of rounds in which the draft at each position was accepted, all before it included.
        mean_length: tokens per forward of the trunk.
        seconds_one, seconds_window, seconds_head: of one step with its logits: the trunk over 1 position and over drafts + 1, the head over 1.
        unsteadiness: median over fastest of these; far from 1 on a machine that did other things too, and then they say little.
        speedup: what the acceptance promises at these costs, against plain decoding.
        threads: that the costs were measured with.
    """

    drafts: int
    prompts: int
    prompt_length: int
    prompts_sha256: str
    tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    rounds: int
    drafted: int
    accepted: int
    by_position: list[Estimate]
    mean_length: Estimate
    seconds_one: float
    seconds_window: float
    seconds_head: float
    unsteadiness: float
    speedup: float
    threads: int

    @property
    def steady(self) -> bool:
        """Whether the costs, and so the speedup, were measured on a machine that did little else."""
        return self.unsteadiness <= 1.5


class Evaluation(Record):
    """Source and release on the same rows.

    Attributes:
        text: the name of the text, and the SHA-256 of its file.
        ids_sha256: SHA-256 of the rows' token ids.
        documents, length: rows, and tokens in each.
        tokens: positions that were scored: all but the last of each row.
        loss_increase: negative log-likelihood of the text, release minus source, nats per token. Paired token by token, its standard error is far
            below those of the perplexities, which documents of different difficulty dominate.
        corrections: weights that were read with their low-rank correction (EoRA): engines that add none get the release without.
        hidden_error_by_layer: after each decoder layer, ||release - source|| / ||source|| over the hidden states of all rows.
        seconds, peak_rss, device, peak_vram: of the evaluation.
    """

    text: str
    text_sha256: str
    ids_sha256: str = ""
    documents: int
    length: int = 0
    tokens: int
    compute_dtype: str
    corrections: int = 0
    divergence: Divergence
    perplexity_source: Estimate
    perplexity_release: Estimate
    top1_agreement: Estimate
    loss_increase: Estimate | None = None
    acceptance_source: Acceptance | None = None
    acceptance_release: Acceptance | None = None
    speculation_source: Speculation | None = None
    speculation_release: Speculation | None = None
    hidden_error_by_layer: list[float] = Field(default_factory=list)
    seconds: float = 0.0
    peak_rss: int = 0
    device: str = "cpu"
    peak_vram: int | None = None


class Verification(Record):
    """What one engine did with the finished folder.

    Attributes:
        outcome: `agrees`, `loads` (numerics not proved, `notes` says why), `disagrees`, `failed`.
        consumed, unconsumed: tensors of the files that the engine used, and the names of those it did not.
        mean_kl, max_abs_logprob: our reading of the file against the engine's, on `positions` positions.
        file: the file, where a release has several networks (GGUF).
        adapter: the name of the folder of corrections (EoRA) that were added on both sides; None for the release alone.
        original_kl: transformers on the source against this engine on the file, where someone gave the source and the file is unquantized; agreement
            needs it to be at most `original_tolerance_kl`.
    """

    engine: str
    file: str | None = None
    adapter: str | None = None
    version: str
    outcome: str
    consumed: int
    unconsumed: list[str] = Field(default_factory=list)
    uninitialized: list[str] = Field(default_factory=list)
    positions: int = 0
    mean_kl: float | None = None
    max_abs_logprob: float | None = None
    tolerance_kl: float | None = None
    original_kl: float | None = None
    original_tolerance_kl: float | None = None
    generated: str | None = None
    image: str | None = None
    speculation: dict[str, float] | None = None
    notes: list[str] = Field(default_factory=list)


class LoadFinding(Record):
    """One thing that an engine would stumble over, told from headers and config.

    Attributes:
        level: `refuses`, `random`, `wrong`, `lost`, `note`; see `qwench.loading.findings`.
        rule: what the engine does, and the file of its public repository where that is written.
        names: the tensors or modules that it is about.
    """

    level: str
    what: str
    mend: str
    rule: str = ""
    names: list[str] = Field(default_factory=list)


class LoadProof(Record):
    """How an engine would load the folder, played through without it (`qwench verify --offline`).

    Attributes:
        good: every tensor reaches its place and every parameter is filled.
        models: the engine's classes.
        consumed: stored tensors that reach a parameter.
    """

    engine: str
    version: str
    good: bool
    models: list[str] = Field(default_factory=list)
    consumed: int = 0
    findings: list[LoadFinding] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class TaskScore(Record):
    """One metric of one benchmark, by lm-eval, on the release and on its source with the same engine.

    Attributes:
        task, metric: lm-eval's names.
        file: of a GGUF release.
        engine, version: who ran both, and lm-eval's version.
        samples, few_shot: documents, and examples before each.
        release, source: means with lm-eval's standard errors.
        difference: release minus source, document by document: its standard error is far below theirs. None where the metric has no value for each document.
        recovery: release / source with the error of the paired difference; None where larger is not better, or the source has 0.
    """

    task: str
    metric: str
    file: str | None = None
    engine: str
    version: str
    samples: int
    few_shot: int = 0
    release: Estimate
    source: Estimate
    difference: Estimate | None = None
    recovery: Estimate | None = None


class Result(Record):
    qwench: str = __version__
    recipe: dict[str, Any]
    source: SourceFacts
    files: list[FileFact]
    precision: list[PrecisionRow]
    errors: list[TensorError]
    run: RunFacts
    calibration: CalibrationFacts | None = None
    graft: GraftFacts | None = None
    pruning: PruningFacts | None = None
    acceptance: AcceptanceCheck | None = None
    evaluation: Evaluation | None = None
    verifications: list[Verification] = Field(default_factory=list)
    tasks: list[TaskScore] = Field(default_factory=list)
    load_proofs: list[LoadProof] = Field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files)


def read_result(folder: Path) -> Result:
    """The record of a release folder. Raises CheckpointError where there is none or it is not ours."""
    path = folder / FILE_NAME
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {FILE_NAME}", "give the folder of a release that `qwench run` made") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not a record of this version: {error}", "make the release again") from None


def write_result(folder: Path, result: Result) -> None:
    """Replace the record in one move."""
    beside = folder / (FILE_NAME + ".new")
    beside.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    beside.replace(folder / FILE_NAME)
