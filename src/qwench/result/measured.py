"""How good a release is: divergence from its source, acceptance of its MTP head, benchmarks."""

from __future__ import annotations

from pydantic import Field

from qwench.result.record import Estimate, Record


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
