"""Models of a few tokens, for tests of decoding: a Markov chain in the place of the trunk, another in the place of its head, and checkpoints with a tiny vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.memory import MemorySource


class Chain:
    """A model whose next token depends on the last two tokens that it remembers: logits [V, V, V].

    Hidden states are the logits themselves, of the chain or of its drafter."""

    def __init__(self, logits_VVV: Tensor) -> None:
        self.table, self.vocabulary = logits_VVV, len(logits_VVV)
        self.tokens: list[int] = []
        self.forwards = 0

    @property
    def length(self) -> int:
        return len(self.tokens)

    def read(self, tokens: Sequence[int], keep: bool = False) -> Tensor:
        self.forwards += 1
        hidden = []
        for token in tokens:
            hidden.append(self.table[self.tokens[-1] if self.tokens else 0, token])
            self.tokens.append(token)
        return torch.stack(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def embed(self, tokens: Sequence[int]) -> Tensor:
        return F.one_hot(torch.tensor(list(tokens)), self.vocabulary).float()

    def rewind(self, length: int) -> None:
        assert length <= self.length
        del self.tokens[length:]


class ChainDrafter:
    """Drafts from the last two tokens that it remembers. Entry t of its memory is the token at t + 1."""

    def __init__(self, logits_VVV: Tensor) -> None:
        self.chain = Chain(logits_VVV)

    @property
    def length(self) -> int:
        return self.chain.length

    def read(self, hidden_TD: Tensor, embedded_TD: Tensor) -> Tensor:
        assert len(hidden_TD) == len(embedded_TD)
        return self.chain.read(embedded_TD.argmax(-1).tolist())

    def rewind(self, length: int) -> None:
        self.chain.rewind(length)


def table(vocabulary: int, seed: int, spread: float = 1.5) -> Tensor:
    return spread * torch.randn(vocabulary, vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))


def few_tokens(source: MemorySource, vocabulary: int) -> MemorySource:
    """The same checkpoint with only its first tokens."""
    source.config.get("text_config", source.config)["vocab_size"] = vocabulary
    for name in source.values:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            source.values[name] = source.values[name][:vocabulary].clone()
    return source


def chi_square(found: Iterable[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """How likely counts this far from the expected shares are, by Pearson's test; outcomes expected fewer than 5 times are one outcome together."""
    found = list(found)
    counts = dict.fromkeys(expected, 0)
    for outcome in found:
        if outcome not in counts:
            return 0.0
        counts[outcome] += 1
    pairs = [(counts[o], share * len(found)) for o, share in expected.items()]
    rare = [(n, mean) for n, mean in pairs if mean < 5]
    pairs = [pair for pair in pairs if pair[1] >= 5]
    if rare:
        pairs.append((sum(n for n, _ in rare), sum(mean for _, mean in rare)))
    statistic = sum((n - mean) ** 2 / mean for n, mean in pairs if mean > 0)
    return float(torch.special.gammaincc(torch.tensor((len(pairs) - 1) / 2.0).double(), torch.tensor(statistic / 2.0).double()))


def sequences(vocabulary: int, length: int) -> list[tuple[int, ...]]:
    return list(product(range(vocabulary), repeat=length))
