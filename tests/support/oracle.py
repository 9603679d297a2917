"""Checkpoints whose right continuation is known without training: a trunk that walks along a cycle of tokens, and an MTP head that foresees it.

Random weights say nothing about an MTP head: its drafts are rejected however it is wired. Here the head is right by construction, for a reader that puts every
piece in its place, and wrong for any other:

- Embeddings are Fourier features of the place j in the cycle: pairs (cos f j, sin f j), so that one step along the cycle is a rotation R of the embedding, and
  R^n is a matrix for every n. All layers add next to nothing (their last matrices are scaled down), so the trunk's state is its token's embedding.
- Every norm has weights w with 1 + w = +-exp(u), u uniform in [-1, 1]: large, of both signs. A norm that is left out, applied twice, in the wrong place or without the 1
  breaks what comes after it. What follows each norm undoes it. (Both numbers of a pair get one magnitude: then no norm's divisor depends on the token.)
- fc is [I + 3 R^4 | -3 R^5], before the norms are undone. Of embedding E(t+1) = R E(t) and state E(t) it makes R E(t): the right state. The embedding alone
  would say R^5 E(t), four tokens too far, and so for the state: only both halves, each in its place, cancel.

The head's output is again the state of the token that it has read, so that it may draft any number of tokens: every draft is right.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwench.demo import checkpoint
from tests.support.tiny import save_checkpoint, tiny_config, tiny_shapes, tiny_tensors

CYCLE = range(16, 1396)
"""Tokens of the cycle; the special tokens of the borrowed tokenizer are outside."""
QUIET = 1e-3
"""Layers' last matrices are scaled by it."""
LAST = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")
GEOMETRY = dict(
    vocab_size=1504, head_dim=64, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=64, linear_value_head_dim=64,
)  # fmt: skip
"""Heads that vLLM's CPU kernels take (Gated DeltaNet in 64 or 128 channels), and rows for the demo tokenizer."""


def runnable_config(moe: bool = False) -> dict[str, Any]:
    """The config of a tiny checkpoint that vLLM's CPU kernels take, with the vocabulary of the demo tokenizer."""
    config, demo = tiny_config(moe=moe), json.loads((checkpoint("dense") / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= GEOMETRY
    config["text_config"]["rope_parameters"]["mrope_section"] = [3, 3, 2]
    return config | {name: demo[name] for name in demo if name.endswith("_token_id")}


def write_runnable(folder: Path, moe: bool = False, seed: int = 0) -> Path:
    """A random checkpoint that both engines can run, images included; the experts of the trunk are fused."""
    config = runnable_config(moe)
    save_checkpoint(folder, config, tiny_tensors(tiny_shapes(config), seed=seed), shards=2)
    return borrow_sidecars(folder)


def write_oracle(folder: Path, moe: bool = False, seed: int = 0, swap_halves: bool = False) -> Path:
    """Write an oracle checkpoint.

    Args:
        swap_halves: write fc with its halves exchanged: every draft is wrong then.
    """
    config = runnable_config(moe)
    tensors = tiny_tensors(tiny_shapes(config, trunk_experts="single" if moe else "fused"), seed=seed)
    for name in tensors:
        if name.endswith(LAST):
            tensors[name] = tensors[name] * QUIET
    tensors |= construct(config["text_config"], seed, swap_halves)
    save_checkpoint(folder, config, {n: t.to(torch.bfloat16).contiguous() for n, t in tensors.items()})
    return borrow_sidecars(folder)


def borrow_sidecars(folder: Path) -> Path:
    """Tokenizer and processor config of the dense demo checkpoint: vLLM opens them for every checkpoint of this architecture, text or not."""
    for path in checkpoint("dense").iterdir():
        if path.name.endswith(("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")):
            shutil.copy(path, folder)
    return folder


def cycle_row(length: int, start: int = 5) -> list[int]:
    """`length` tokens along the cycle."""
    return [CYCLE[(start + i) % len(CYCLE)] for i in range(length)]


def construct(text: dict[str, Any], seed: int, swap_halves: bool) -> dict[str, Tensor]:
    """Embedding, head, the norms between them, and fc, float32."""
    hidden, vocabulary, generator = text["hidden_size"], text["vocab_size"], torch.Generator().manual_seed(seed)
    places, cycle = len(CYCLE), slice(CYCLE.start, CYCLE.stop)
    frequencies = (1 + torch.randperm(places // 2 - 1, generator=generator)[: hidden // 2]) * 2 * torch.pi / places
    angles = torch.arange(places)[:, None] * frequencies
    embedding = torch.zeros(vocabulary, hidden)
    embedding[cycle] = torch.stack([angles.cos(), angles.sin()], -1).flatten(1)
    final, own, of_embedding, of_hidden = (gains(hidden, generator) for _ in range(4))
    head = torch.zeros(vocabulary, hidden)
    head[cycle] = embedding[cycle].roll(1, 0) / final  # the row of a token is the state of the one before it
    norms = {
        "model.language_model.norm": final, "mtp.norm": own,
        "mtp.pre_fc_norm_embedding": of_embedding, "mtp.pre_fc_norm_hidden": of_hidden,
    }  # fmt: skip
    fc = joined(frequencies, final, own, of_embedding, of_hidden)
    return {
        "model.language_model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        "mtp.fc.weight": fc.roll(hidden, 1) if swap_halves else fc,
        **{f"{name}.weight": gain - 1 for name, gain in norms.items()},
    }


def gains(hidden: int, generator: torch.Generator) -> Tensor:
    """1 + w of a norm: +-exp(u), one magnitude for each pair."""
    magnitude = torch.empty(hidden // 2).uniform_(-1, 1, generator=generator).exp().repeat_interleave(2)
    return magnitude * (1 - 2 * torch.randint(0, 2, (hidden,), generator=generator))


def rotation(frequencies: Tensor, steps: int) -> Tensor:
    """R^steps: moves an embedding that many places along the cycle."""
    cos, sin = (steps * frequencies).cos(), (steps * frequencies).sin()
    return torch.block_diag(*[torch.tensor([[c, -s], [s, c]]) for c, s in zip(cos.tolist(), sin.tolist(), strict=True)])


def joined(frequencies: Tensor, final: Tensor, own: Tensor, of_embedding: Tensor, of_hidden: Tensor) -> Tensor:
    """fc [hidden, 2 * hidden]: undoes the norms before it, and prepares for the head's own norm and for lm_head after it."""
    embedded = torch.eye(len(final)) + 3 * rotation(frequencies, 4)
    state = -3 * rotation(frequencies, 5)
    spread = final.square().mean().sqrt()  # what pre_fc_norm_hidden divides the trunk's normed state by
    halves = torch.cat([embedded / of_embedding, state * spread / (final * of_hidden)], 1)
    return (final / own)[:, None] * halves
