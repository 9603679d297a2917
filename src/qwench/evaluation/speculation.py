"""What are the drafts of an MTP head worth? Free-running: the model writes, reads what it wrote, and its head drafts (`decoding`).

Reported is what engines report, so that their counters can stand beside ours: drafts, accepted drafts, and the share of rounds in which the draft at position k
was accepted, which needs all before it to be. With a forward of the trunk for every round, mean accepted length = tokens per forward = 1 + accepted drafts per round.

The speedup that this promises depends on what the steps cost. A round costs one forward over K + 1 positions and K steps of the head; without drafts each token
costs one forward over one position. Measured here, on this machine, at the length of the last row:

    speedup = (1 + accepted / rounds) * t(1) / (t(K + 1) + K * t(head))

That is our own reference decoder, in Python: a serving engine has other ratios, and puts its own costs into the same formula. Where weights do not fit the limit
they are read again for every forward, and the costs say so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qwench.checkpoint.source import TensorSource
from qwench.evaluation.decoding import Drafter, Generated, Model, generate_with_drafts
from qwench.evaluation.sampling import Sampling
from qwench.evaluation.statistics import Mean, clustered_mean
from qwench.models.decoder import KEPT, Decoder
from qwench.models.map import ModelMap
from qwench.models.mtp import MtpHead
from qwench.models.place import CPU
from qwench.models.run import Trunk

REPEATS, TIMING = 3, 3.0
"""The steps are measured in turn, at least so many times each and for so many seconds. The fastest counts: whatever else the machine does only adds."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of one step, its logits included.

    Attributes:
        one, window: of the trunk, over 1 position and over K + 1.
        head: of the head, over 1.
        unsteadiness: how much longer than the fastest the median took, of the step where that is worst: 1 on a machine that does nothing else.
    """

    one: float
    window: float
    head: float
    unsteadiness: float = 1.0


@dataclass(frozen=True)
class SpeculationReport:
    """Speculative decoding, measured.

    Attributes:
        drafts: K, tokens drafted in each round.
        sampling, seed: how tokens were chosen; row i draws from a source seeded with seed + i.
        prompts: the rows' prompts.
        rows: what came of each.
        costs: of the steps, on this machine.
        seconds: of generating all rows, prompts included.
    """

    drafts: int
    sampling: Sampling
    seed: int
    prompts: list[list[int]]
    rows: list[Generated]
    costs: StepCosts
    seconds: float

    @property
    def rounds(self) -> int:
        """Forwards of the trunk, those over the prompts aside."""
        return sum(len(row.accepted) for row in self.rows)

    @property
    def drafted(self) -> int:
        return self.rounds * self.drafts

    @property
    def accepted(self) -> int:
        return sum(sum(row.accepted) for row in self.rows)

    @property
    def accepted_at(self) -> list[int]:
        """For each draft position, in how many rounds its draft was accepted."""
        return [sum(count > place for row in self.rows for count in row.accepted) for place in range(self.drafts)]

    @property
    def acceptance(self) -> list[float]:
        """Share of rounds in which the draft at each position was accepted; 0 where there was no round."""
        return [count / max(1, self.rounds) for count in self.accepted_at]

    @property
    def mean_length(self) -> float:
        """Tokens per forward of the trunk."""
        return 1 + self.accepted / max(1, self.rounds)

    @property
    def speedup(self) -> float:
        """Expected against plain decoding, from the measured costs."""
        return self.mean_length * self.costs.one / (self.costs.window + self.drafts * self.costs.head)

    def acceptance_means(self) -> list[Mean]:
        """`acceptance` with a standard error over rows. Raises TextError for fewer than two rows."""
        counts, rows = self._rounds()
        return [clustered_mean(counts > place, rows) for place in range(self.drafts)]

    def length_mean(self) -> Mean:
        """`mean_length` with a standard error over rows. Raises TextError for fewer than two rows."""
        counts, rows = self._rounds()
        return clustered_mean(1 + counts, rows)

    def _rounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Accepted drafts of each round, and its row."""
        counts = torch.tensor([count for row in self.rows for count in row.accepted])
        return counts, torch.arange(len(self.rows)).repeat_interleave(torch.tensor([len(row.accepted) for row in self.rows]))


def speculate(
    source: TensorSource, map: ModelMap, prompts: Sequence[Sequence[int]], *, tokens: int, drafts: int,
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, stop: Sequence[int] = (),
    dtype: torch.dtype = torch.float32, device: torch.device = CPU.device, keep: int = KEPT, timing: float = TIMING,
    progress: Callable[[int, int], None] | None = None,
) -> SpeculationReport:  # fmt: skip
    """Generate after each prompt with drafts of the checkpoint's own MTP head.

    Args:
        source: a checkpoint, or a release.
        map: its map.
        prompts: rows of token ids, of any lengths, at least one row; for standard errors at least two.
        tokens: how many to generate after each.
        drafts: K, at least 1.
        temperature, top_k, top_p: see `Sampling`; the same for trunk and head.
        seed: of the source of chance.
        stop: tokens that end a row.
        dtype, device: what to compute in, and on.
        keep: bytes of the trunk's weights that may stay in memory; the others are read for every forward.
        timing: seconds to spend on measuring what the steps cost; few of them measure little on a busy machine.
        progress: called with (rows done, rows) after each.

    Raises:
        CheckpointError: no MTP head that can be run, or tensors that cannot be read.
        TextError: an empty prompt.
        UserError: sampling parameters out of range.
    """
    assert prompts and tokens >= 1 and drafts >= 1
    sampling, head = Sampling(temperature, top_k, top_p), MtpHead(source, map, dtype, device)
    decoder = Decoder(Trunk(source, map, dtype, device), keep)
    rows, begun, spent = list[Generated](), time.monotonic(), 0.0
    for number, prompt in enumerate(prompts):
        model, drafter = decoder.begin(), head.begin()
        rows.append(generate_with_drafts(model, drafter, prompt, tokens, drafts, sampling, seed + number, stop))
        spent = time.monotonic() - begun
        if progress:
            progress(number + 1, len(prompts))
    costs = step_costs(model, drafter, drafts, timing)
    decoder.free()
    head.free()
    return SpeculationReport(drafts, sampling, seed, [list(p) for p in prompts], rows, costs, spent)


def step_costs(model: Model, drafter: Drafter, drafts: int, timing: float = TIMING) -> StepCosts:
    """What the steps cost on from where a row ended, measured for `timing` seconds; the row is left as it was."""
    token, model_length, drafter_length = 0, model.length, drafter.length
    state = model.read([token], keep=True)
    model.rewind(model_length)

    def trunk(count: int) -> None:
        model.logits(model.read([token] * count, keep=count > 1))
        model.rewind(model_length)

    def head() -> None:
        model.logits(drafter.read(state, model.embed([token])))
        drafter.rewind(drafter_length)

    steps = (lambda: trunk(1), lambda: trunk(drafts + 1), head)
    until, rounds = time.monotonic() + timing, list[list[float]]()
    while len(rounds) < REPEATS or time.monotonic() < until:
        rounds.append([_seconds(step) for step in steps])
    taken = list(zip(*rounds, strict=True))
    fastest = [min(times) for times in taken]
    unsteadiness = max(statistics.median(times) / best for times, best in zip(taken, fastest, strict=True))
    return StepCosts(fastest[0], fastest[1], fastest[2], unsteadiness)


def _seconds(step: Callable[[], None]) -> float:
    begun = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a GPU is told what to do, and does it later
    return time.perf_counter() - begun
