"""How good a release is: divergence from its source, acceptance of its MTP head, benchmarks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qwench.result.record import NO_UNIT, Bytes, Estimate, Nats, Ratio, Record, Rows, Seconds, Share, Tokens, unit

NatsEstimate = Annotated[Estimate, unit("nats per token")]
ShareEstimate = Annotated[Estimate, unit("share from 0 to 1")]
Perplexity = Annotated[Estimate, unit("perplexity")]


class Divergence(Record):
    """KL(source || release) of the next-token distributions, token by token, over the whole vocabulary."""

    mean: NatsEstimate
    """Over all scored positions."""
    p99: Nats
    """What 99% of tokens are at or below."""
    p999: Nats
    """What 99.9% of tokens are at or below."""
    max: Nats
    """The largest."""
    histogram_edges: list[Nats] = Field(default_factory=list)
    """Four to a factor of ten, the same for every release."""
    histogram_counts: list[Tokens] = Field(default_factory=list)
    """One fewer than edges. The lowest bin also holds everything below it, zero included, the highest everything above it."""


class LayerDivergence(Record):
    """KL(source || release) as if the network ended after each layer: a logit lens.

    At some positions, evenly spaced over all that were scored, the hidden states after each decoder layer go through the model's own final norm and output head, the source's
    through its and the release's through its; the divergence of the two distributions is taken over the whole vocabulary. The last layer's value is the divergence itself at these positions. Early
    layers were not trained to be read so: what a layer adds says where a release comes apart, not how much it would say if the network were cut there.
    """

    positions: Annotated[int, unit("positions")]
    """How many were read, over all rows together."""
    by_layer: list[NatsEstimate]
    """After decoder layer 0, 1, 2 ..., mean over the positions."""


class Acceptance(Record):
    """Drafts of the MTP head that its own trunk accepts greedily, teacher-forced on the text."""

    by_position: list[ShareEstimate]
    """By draft position from 1; a position counts only where all before it were accepted."""


class AcceptanceCheck(Record):
    """What the run itself measured of the MTP head before it finished: the finished bytes against what they were made from, on held-out rows."""

    floor: Share
    """Of the source's acceptance at position 1, what the release had to reach."""
    source: Acceptance | None = None
    """Of what the release was made from; null where it was not measured."""
    release: Acceptance | None = None
    """Of the finished bytes; null where it was not measured."""
    text: str = ""
    """The name of the text."""
    ids_sha256: str = ""
    """SHA-256 of the rows' token ids."""
    documents: Rows = 0
    """That were read."""
    length: Tokens = 0
    """Of each row."""
    not_measured: str = ""
    """Why not; empty where it was."""
    overridden: bool = False
    """The release fell under the floor and was finished because somebody said so."""


class Speculation(Record):
    """Speculative decoding by our reference decoder: the model writes, reads what it wrote, and its own MTP head drafts (`qwench eval --speculate`)."""

    drafts: Tokens
    """Drafted in each round."""
    prompts: Rows
    """That were written on from."""
    prompt_length: Tokens
    """Of each row, what was read before."""
    prompts_sha256: str
    """SHA-256 of their token ids."""
    tokens: Tokens
    """Generated after each prompt."""
    temperature: Annotated[float, unit("divides the logits")]
    """How tokens were chosen; 0 is greedy."""
    top_k: Tokens
    """The most likely tokens that were chosen among; 0 is all."""
    top_p: Share
    """Of the probability, what was chosen among."""
    seed: Annotated[int, unit(NO_UNIT)]
    """Of the choice."""
    rounds: Annotated[int, unit("forwards of the trunk")]
    """As engines count them."""
    drafted: Tokens
    """By the head, in all rounds."""
    accepted: Tokens
    """Of those."""
    by_position: list[ShareEstimate]
    """Of rounds, those in which the draft at each position was accepted, all before it included."""
    mean_length: Annotated[Estimate, unit("tokens per forward of the trunk")]
    """What a round yields."""
    seconds_one: Seconds
    """Of one step of the trunk over 1 position, with its logits."""
    seconds_window: Seconds
    """Of one step of the trunk over `drafts` + 1 positions."""
    seconds_head: Seconds
    """Of one step of the head."""
    unsteadiness: Ratio
    """Median over fastest of these steps; far from 1 on a machine that did other things too, and then they say little."""
    speedup: Ratio
    """What the acceptance promises at these costs, against plain decoding."""
    threads: Annotated[int, unit("threads")]
    """That the costs were measured with."""

    @property
    def steady(self) -> bool:
        """Whether the costs, and so the speedup, were measured on a machine that did little else."""
        return self.unsteadiness <= 1.5


class Figures(Record):
    """How one reading of the release compares with the source."""

    divergence: Divergence
    """KL(source || release) per token."""
    perplexity_release: Perplexity
    """Of the text."""
    top1_agreement: ShareEstimate
    """Of positions, those where both have the same most likely token."""
    loss_increase: NatsEstimate | None = None
    """Negative log-likelihood of the text, release minus source. Paired token by token, its standard error is far below those of the perplexities, which documents of
    different difficulty dominate."""
    acceptance_release: Acceptance | None = None
    """Of the release's MTP head; null where it has none."""
    speculation_release: Speculation | None = None
    """Of the release's MTP head, running free; null where nobody asked."""
    hidden_error_by_layer: list[Ratio] = Field(default_factory=list)
    """After each decoder layer, ||release - source|| / ||source|| over the hidden states of all rows: what has come together so far."""
    own_error_by_layer: list[Ratio] = Field(default_factory=list)
    """What each decoder layer adds by itself: the release's layer and the source's are given the same hidden states, those of the source before it, and ||release - source|| / ||source|| is
    taken after it, over every fourth row. Empty in records of before it was measured."""
    divergence_by_layer: LayerDivergence | None = None
    """The divergence as if the network ended after each layer; null in records of before it was measured."""


class Evaluation(Figures):
    """Source and release on the same rows (`qwench eval`). Where low-rank corrections (EoRA) lie with the release, its figures are those with them."""

    text: str
    """The name of the text."""
    text_sha256: str
    """SHA-256 of its file."""
    ids_sha256: str = ""
    """SHA-256 of the rows' token ids."""
    documents: Rows
    """That were read."""
    length: Tokens = 0
    """Of each row."""
    tokens: Annotated[int, unit("positions")] = 0
    """That were scored: all but the last of each row."""
    compute_dtype: str
    """What both were computed in: `float32`, `bfloat16`."""
    corrections: Annotated[int, unit("weights")] = 0
    """That were read with their low-rank correction: engines that add none get `without_corrections`."""
    without_corrections: Figures | None = None
    """The same release on the same rows without its corrections; null where there are none, and in records of before it was measured."""
    perplexity_source: Perplexity
    """Of the text."""
    acceptance_source: Acceptance | None = None
    """Of the source's MTP head; null where it has none."""
    speculation_source: Speculation | None = None
    """Of the source's MTP head, running free; null where nobody asked."""
    seconds: Seconds = 0.0
    """Of the evaluation."""
    peak_rss: Bytes = 0
    """Memory of its process at most."""
    device: str = "cpu"
    """Where layers ran."""
    peak_vram: Bytes | None = None
    """GPU memory held at most; null without a GPU."""


class TaskScore(Record):
    """One metric of one benchmark, by lm-eval, on the release and on its source with the same engine (`qwench eval --tasks`)."""

    task: str
    """lm-eval's name."""
    metric: str
    """lm-eval's name."""
    file: str | None = None
    """Which file of a GGUF release."""
    engine: str
    """Who ran both."""
    version: str
    """lm-eval's."""
    samples: Annotated[int, unit("documents")]
    """That were scored."""
    few_shot: Annotated[int, unit("examples")] = 0
    """Before each document."""
    release: Annotated[Estimate, unit("that of the metric")]
    """Mean with lm-eval's standard error."""
    source: Annotated[Estimate, unit("that of the metric")]
    """Mean with lm-eval's standard error."""
    difference: Annotated[Estimate, unit("that of the metric")] | None = None
    """Release minus source, document by document: its standard error is far below theirs. Null where the metric has no value for each document."""
    recovery: Annotated[Estimate, unit("ratio")] | None = None
    """Release / source with the error of the paired difference; null where larger is not better, or the source has 0."""
