"""The MTP head, batched over all positions, against a literal engine: one draft at a time with a growing cache of keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwench.errors import CheckpointError
from qwench.models import map_of
from qwench.models.modules import Modules, lend, text_positions
from qwench.models.mtp import MtpHead, attend
from qwench.models.run import Trunk
from qwench.models.weights import read_block
from tests.support.memory import MemorySource, tiny_source

HEADS: list[dict[str, Any]] = [
    dict(moe=False),
    dict(moe=True, mtp="single"),
    dict(moe=True, mtp="fused", layout="causal", trunk_experts="single"),
]


def zero_centred(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight)


def rotate(x_HA: Tensor, position: int, rotary: int) -> Tensor:
    """Rotary embedding of the first `rotary` channels, channel i with channel i + rotary/2."""
    half = rotary // 2
    angle = position * 10_000_000 ** -(torch.arange(half) * 2 / rotary)
    low, high = x_HA[:, :half], x_HA[:, half:rotary]
    turned = [low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()]
    return torch.cat([*turned, x_HA[:, rotary:]], dim=-1)


class LiteralHead:
    """One position at a time, weights by their stored names, an explicit cache: position -> (keys, values)."""

    def __init__(self, source: MemorySource) -> None:
        self.w = {n.removeprefix("mtp."): t.float() for n, t in source.values.items() if n.startswith("mtp.")}
        self.text = source.config.get("text_config", source.config)
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}

    def step(self, hidden_D: Tensor, embedded_D: Tensor, position: int) -> Tensor:
        """Writes its keys and values at `position`, attends to all entries up to it."""
        w, head = self.w, self.text["head_dim"]
        halves = (
            zero_centred(embedded_D, w["pre_fc_norm_embedding.weight"]),
            zero_centred(hidden_D, w["pre_fc_norm_hidden.weight"]),
        )
        x = w["fc.weight"] @ torch.cat(halves)
        n = zero_centred(x, w["layers.0.input_layernorm.weight"])
        both = (w["layers.0.self_attn.q_proj.weight"] @ n).view(-1, 2 * head)
        query, gate = both[:, :head], both[:, head:]
        key, value = ((w[f"layers.0.self_attn.{k}_proj.weight"] @ n).view(-1, head) for k in "kv")
        query = rotate(zero_centred(query, w["layers.0.self_attn.q_norm.weight"]), position, head // 4)
        key = rotate(zero_centred(key, w["layers.0.self_attn.k_norm.weight"]), position, head // 4)
        self.cache[position] = key, value
        entries = [self.cache[p] for p in sorted(self.cache) if p <= position]
        read = []
        for h in range(len(query)):
            shared = h * len(key) // len(query)
            scores = torch.stack([k[shared] @ query[h] for k, _ in entries]) * head**-0.5
            read.append(sum(p * v[shared] for p, (_, v) in zip(scores.softmax(0), entries, strict=True)))
        x = x + w["layers.0.self_attn.o_proj.weight"] @ (torch.stack(read) * gate.sigmoid()).flatten()
        x = x + self.mlp(zero_centred(x, w["layers.0.post_attention_layernorm.weight"]))
        return zero_centred(x, w["norm.weight"])

    def mlp(self, n: Tensor) -> Tensor:
        w = {name.removeprefix("layers.0.mlp."): t for name, t in self.w.items()}

        def swiglu(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return down @ (F.silu(gate @ n) * (up @ n))

        if "gate_proj.weight" in w:
            return swiglu(w["gate_proj.weight"], w["up_proj.weight"], w["down_proj.weight"])
        share, chosen = (w["gate.weight"] @ n).softmax(0).topk(self.text["num_experts_per_tok"])
        shared = (f"shared_expert.{k}_proj.weight" for k in ("gate", "up", "down"))
        out = (w["shared_expert_gate.weight"] @ n).sigmoid() * swiglu(*(w[name] for name in shared))
        for s, e in zip(share / share.sum(), chosen.tolist(), strict=True):
            if "experts.gate_up_proj" in w:
                gate, up = w["experts.gate_up_proj"][e].chunk(2)
                down = w["experts.down_proj"][e]
            else:
                gate, up, down = (w[f"experts.{e}.{k}_proj.weight"] for k in ("gate", "up", "down"))
            out = out + s * swiglu(gate, up, down)
        return out


def inputs(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, 128, generator=generator), torch.randn(2, length, 128, generator=generator)


@pytest.mark.parametrize("options", HEADS, ids=["dense", "moe-single", "moe-fused"])
def test_drafts_equal_a_sequential_engine(options: dict[str, Any]) -> None:
    length, steps = 7, 3
    source = tiny_source(**options)
    hidden, embedded = inputs(length)
    found = MtpHead(source, map_of(source)).drafts(hidden, embedded, steps)
    assert [d.shape for d in found] == [(2, length - j, 128) for j in (1, 2, 3)]
    for row in range(2):
        for start in range(length - 1):
            engine = LiteralHead(source)
            for t in range(start + 1):  # the entries that the engine wrote from the trunk's hidden states
                draft = engine.step(hidden[row, t], embedded[row, t + 1], t)
            for j in range(1, min(steps, length - 1 - start) + 1):
                if j > 1:
                    draft = engine.step(draft, embedded[row, start + j], start + j - 1)
                assert torch.allclose(found[j - 1][row, start], draft, atol=2e-5), (row, start, j)


@pytest.mark.parametrize("options", HEADS, ids=["dense", "moe-single", "moe-fused"])
@torch.no_grad()
def test_the_first_step_is_the_transformers_layer(options: dict[str, Any]) -> None:
    source = tiny_source(**options)
    map = map_of(source)
    hidden, embedded = inputs(9)
    head, modules = MtpHead(source, map), Modules(source.config, map)
    x = head.combine(hidden[:, :-1], embedded[:, 1:])
    weights = read_block(source, map.mtp[0], "mtp.layers.0.", torch.float32)
    rope = modules.rope(text_positions(8), x)
    layer = lend(modules.layer("full_attention"), weights, x, position_embeddings=rope, attention_mask=None)
    expected = lend(modules.norm, {"weight": source.values["mtp.norm.weight"].float()}, layer)
    assert torch.allclose(head.drafts(hidden, embedded, 1)[0], expected, atol=1e-5)


@pytest.mark.parametrize("options", HEADS, ids=["dense", "moe-single", "moe-fused"])
def test_reading_with_a_cache_equals_a_sequential_engine(options: dict[str, Any]) -> None:
    """Two rounds: drafts from the head's own states, which are forgotten before the trunk's take their places."""
    source = tiny_source(**options)
    hidden, embedded = (x[0] for x in inputs(12))
    reading, engine = MtpHead(source, map_of(source)).begin(), LiteralHead(source)

    def same(found: Tensor, expected: Tensor) -> bool:
        return torch.allclose(found, expected, atol=2e-5)

    state = reading.read(hidden[:5], embedded[1:6])
    literal = [engine.step(hidden[t], embedded[t + 1], t) for t in range(5)]
    assert reading.length == 5 and same(state, torch.stack(literal))
    state, draft = state[-1:], literal[-1]
    for position in (5, 6):
        state, draft = reading.read(state, embedded[position + 1][None]), engine.step(draft, embedded[position + 1], position)
        assert same(state[0], draft)
    reading.rewind(5)
    state = reading.read(hidden[5:8], embedded[6:9])  # overwrites positions 5 and 6
    literal = [engine.step(hidden[t], embedded[t + 1], t) for t in (5, 6, 7)]
    assert reading.length == 8 and same(state, torch.stack(literal))
    assert same(reading.read(state[-1:], embedded[9:10])[0], engine.step(literal[-1], embedded[9], 8))


def test_attention_in_slices_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(8)
    query = torch.randn(1, 6, 11, 16, generator=generator)
    cache = [
        (torch.randn(1, 3, n, 16, generator=generator), torch.randn(1, 3, n, 16, generator=generator)) for n in (13, 12, 11)
    ]
    whole = attend(query, cache, 0.25)
    monkeypatch.setattr("qwench.models.mtp.QUERIES", 4)
    assert torch.allclose(attend(query, cache, 0.25), whole, atol=1e-6)


def test_given_positions_shift_nothing_when_all_shift_alike() -> None:
    """Rotary embeddings see differences alone."""
    source = tiny_source(moe=True)
    hidden, embedded = inputs(8)
    head = MtpHead(source, map_of(source))
    plain = head.drafts(hidden, embedded, 2)
    shifted = head.drafts(hidden, embedded, 2, text_positions(8).expand(3, 2, 8) + 5)
    stretched = head.drafts(hidden, embedded, 2, text_positions(8).expand(3, 2, 8) * 3)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, shifted, strict=True))
    assert not torch.allclose(plain[0], stretched[0], atol=1e-3)


def test_a_checkpoint_without_a_head_is_refused() -> None:
    source = tiny_source(mtp=None)
    with pytest.raises(CheckpointError, match="no MTP head"):
        MtpHead(source, map_of(source))


def test_a_head_built_to_be_right_is_always_accepted() -> None:
    """A trunk that is a Markov chain (the next token is `successor[token]`) and a head whose fc passes on the embedding alone: every draft agrees.

    With the two halves of fc exchanged nothing does, so this also proves which half comes first."""
    source = tiny_source(moe=True)
    w, vocabulary, hidden = source.values, 416, 128
    for name in w:
        if name.startswith(("model.language_model.layers", "mtp.layers")) and name.endswith(
            ("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")
        ):
            w[name] = w[name] * 0.01
        elif name in ("model.language_model.norm.weight", "mtp.norm.weight") or "pre_fc_norm" in name:
            w[name] = torch.zeros_like(w[name])
    successor = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(9))
    embedding = torch.randn(vocabulary, hidden, generator=torch.Generator().manual_seed(10))
    w["model.language_model.embed_tokens.weight"] = embedding
    w["lm_head.weight"] = torch.empty_like(embedding)
    w["lm_head.weight"][successor] = embedding
    halves = torch.eye(hidden), torch.zeros(hidden, hidden)
    ids = torch.randint(0, vocabulary, (2, 15), generator=torch.Generator().manual_seed(11))

    def agreement(fc: Tensor) -> list[float]:
        w["mtp.fc.weight"] = fc
        map = map_of(source)
        trunk, head = Trunk(source, map), MtpHead(source, map)
        states = trunk.forward(ids)
        own = trunk.greedy(states)
        drafts = head.drafts(states, trunk.embed(ids), 3)
        return [float((trunk.greedy(d) == own[:, j:]).float().mean()) for j, d in enumerate(drafts, start=1)]

    assert agreement(torch.cat(halves, 1)) == [1.0, 1.0, 1.0]
    assert max(agreement(torch.cat(halves[::-1], 1))) < 0.1
