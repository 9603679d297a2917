"""Second moments of a layer's inputs in bounded memory, those of hundreds of experts among them.

A second moment takes I x I floats for each input set: 256 experts of a 35B-A3B layer would take 4.5 GB. But all that a mixture of experts computes follows from
what it reads, x, and from where the router sends each token. So the rows go through the layer once, x [N, D] goes to a file on the way, and then one expert after the other
is handed its own tokens: its first moment, and after it was changed that of its down projection, without attention being run again.

Where an expert's statistics are to be gathered on all tokens (`reach: all`), it is handed those that the router sends elsewhere too. Then all experts read the same x, whose moment is
summed up once; the down projections' moments still come one after the other. Memory stays what it was, time grows with experts over experts a token.

Letters in names: N tokens, D hidden size, I input channels of a set, K experts that a token is sent to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwench.models.expert_products import even_linear
from qwench.models.map import Block
from qwench.stream.hidden import output_errors
from qwench.stream.live import Batch, LiveBlock
from qwench.stream.observe import Moment, Reach, empty, observe
from qwench.stream.walk import Rows

MOMENT_BYTES = 2**30
"""Bytes of second moments that are summed up at once; a set that alone is larger goes alone."""
TOKENS = 4096
"""Tokens that are taken through an expert at once."""


def moments_of(live: LiveBlock, rows: Rows, names: Sequence[str], limit: int = MOMENT_BYTES) -> Iterator[tuple[str, Moment]]:
    """The second moments of input sets, one after the other: (name, moment).

    What a set of a mixture reads is computed when its turn comes, from the weights as they are then: a caller that changes an expert's gate and up before it asks for
    the next set gets the down projection's moment of the changed ones.

    Args:
        names: input sets of the block (see `models.map.Block.inputs`); those of the mixture behind those of the mixer.
        limit: bytes of moments at once; the rows go through the layer as often as that takes.
    """
    inside = [name for name in names if in_mixture(live.block, name)]
    for group in _groups(live.block, [name for name in names if name not in inside], limit):
        moments = observe(live, rows.batches(), group)
        for name in group:
            yield name, moments.pop(name)
    if inside:
        with mixture_of(live, rows.batches(), rows.scratch, reach=rows.reach) as mixture:
            for name in inside:
                yield name, mixture.moment(name)


def in_mixture(block: Block, name: str) -> bool:
    """Whether an input set belongs to a mixture of experts, the shared expert and the router included."""
    return "experts" in block.fused and (name in ("mlp", "shared.down") or name.startswith("experts."))


def _groups(block: Block, names: Sequence[str], limit: int) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for name in names:
        size = 4 * block.inputs[name][0].shape[1] ** 2
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


@dataclass
class Mixture:
    """What a layer's mixture of experts reads on the rows.

    Attributes:
        live: the layer.
        file: x [N, D], token after token.
        dtype: that x is stored in.
        chosen: experts that each token is sent to, int16 [N, K], in main memory.
        shares: the router's weights for them, float32 [N, K], likewise.
        reach: which tokens an expert is handed.
        of_all: the second moment of x over all tokens, where somebody asked for it.
    """

    live: LiveBlock
    file: int
    dtype: torch.dtype
    chosen: Tensor
    shares: Tensor
    reach: Reach = "routed"
    of_all: Moment | None = None

    @property
    def width(self) -> int:
        return self.live.block.inputs["mlp"][0].shape[1]

    def tokens_of(self, expert: int) -> Tensor:
        """Which tokens an expert is handed, int64 [n], in order."""
        if self.reach == "all":
            return torch.arange(len(self.chosen))
        return (self.chosen == expert).any(-1).nonzero().flatten()

    def inputs(self, tokens: Tensor) -> Iterator[Tensor]:
        """x of some tokens (rising) in the layer's dtype on its device, some thousands at a time: [n, D]."""
        for part in torch.split(tokens, TOKENS):
            if len(part):
                yield self._read(part).to(self.live.device, self.live.dtype)

    def read_by(self, name: str) -> Iterator[Tensor]:
        """What an input set reads, some thousands of tokens at a time [n, I], as the weights are now."""
        kind, _, expert = name.partition(".")
        number = int(expert.partition(".")[0]) if kind == "experts" else None
        for x in self.inputs(torch.arange(len(self.chosen)) if number is None else self.tokens_of(number)):
            yield x if name == "mlp" or expert.isdigit() else self._inner(x, number)

    @torch.no_grad()
    def moment(self, name: str, second: bool = True) -> Moment:
        """The sums of an input set; not to be changed, for experts that read the same share them."""
        of_all = second and (name == "mlp" or (self.reach == "all" and name.removeprefix("experts.").isdigit()))
        if of_all and self.of_all is not None:
            return self.of_all
        moment = empty(self.live.block, name, second, self.live.device)
        for inputs in self.read_by(name):
            moment.add(inputs)
        if of_all:
            self.of_all = moment
        return moment

    def _inner(self, x: Tensor, expert: int | None) -> Tensor:
        """What the down projection of an expert (None: the shared one) reads."""
        weights = self.live.weights
        if expert is None:
            gate, up = (F.linear(x, weights[f"mlp.shared_expert.{half}_proj.weight"]) for half in ("gate", "up"))
        else:
            gate, up = even_linear(x, weights["mlp.experts.gate_up_proj"][expert]).chunk(2, -1)
        return F.silu(gate) * up

    def _read(self, tokens: Tensor) -> Tensor:
        """x of some tokens from the file; neighbours in one read."""
        size = self.width * self.dtype.itemsize
        flat = torch.empty(len(tokens) * size, dtype=torch.uint8)
        view = memoryview(flat.numpy().data)
        ends = [0, *((tokens.diff() != 1).nonzero().flatten() + 1).tolist(), len(tokens)]
        for first, last in pairwise(ends):
            at, start = int(tokens[first]) * size, first * size
            while start < last * size:
                moved = os.preadv(self.file, [view[start : last * size]], at)
                assert moved, "the file was written whole"
                at, start = at + moved, start + moved
        return flat.view(self.dtype).view(len(tokens), self.width)


@contextmanager
def mixture_of(
    live: LiveBlock,
    batches: Iterable[Batch | Tensor],
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    reach: Reach = "routed",
) -> Iterator[Mixture]:
    """Take rows through a layer once and keep what its mixture of experts reads, for as long as it lasts.

    Args:
        batches: hidden states before the layer, [B, T, D] each.
        folder: where the file lies, which has no name and is gone whatever happens.
        dtype: that x is stored in; bfloat16 as the model itself would pass it on.
        reach: which tokens each expert is to be handed.

    Raises:
        OutputError: the disk is full.
    """
    chosen: list[Tensor] = []
    shares: list[Tensor] = []
    with ExitStack() as stack:
        with output_errors(folder):
            file = stack.enter_context(TemporaryFile(dir=folder, buffering=0))

        def keep(_module: object, read: tuple[Tensor, ...]) -> None:
            data: Any = read[0].to("cpu", dtype).contiguous().view(torch.uint8).numpy().data
            left = memoryview(data).cast("B")
            with output_errors(folder):
                while left:
                    left = left[file.write(left) :]
            chosen.append(read[1].to("cpu", torch.int16))
            shares.append(read[2].to("cpu", torch.float32))

        handle = live.submodule(next(s for s in live.block.slots if s.expert is not None)).register_forward_pre_hook(keep)
        try:
            for batch in batches:
                live.run(batch)
        finally:
            handle.remove()
        yield Mixture(live, file.fileno(), dtype, torch.cat(chosen), torch.cat(shares), reach)
