"""Trunk and multi-token-prediction head as one float32 module for training, built from the transformers classes.

Letters in names: B rows, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig


class Head(nn.Module):
    """MTP: from the trunk's normed state at t and the embedding of token t+1 to a state that predicts token t+2."""

    def __init__(self, config: Any, layer: type[nn.Module], norm: type[nn.Module]) -> None:
        super().__init__()
        attention_only = copy.deepcopy(config)
        attention_only.layer_types = ["full_attention"]
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.pre_fc_norm_embedding = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([layer(attention_only, 0)])
        self.norm = norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_BTD: Tensor, embedded_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        both = torch.cat([self.pre_fc_norm_embedding(embedded_BTD), self.pre_fc_norm_hidden(hidden_BTD)], -1)
        return self.norm(self.layers[0](self.fc(both), position_embeddings=rope, attention_mask=None))


class Network(nn.Module):
    def __init__(self, text: dict[str, Any]) -> None:
        super().__init__()
        sparse = "num_experts" in text
        self.config = (Qwen3_5MoeTextConfig if sparse else Qwen3_5TextConfig)(**(text | {"dtype": "float32"}))
        self.config._attn_implementation = "sdpa"
        self.config._experts_implementation = "eager"
        self.trunk = (moe.Qwen3_5MoeTextModel if sparse else dense.Qwen3_5TextModel)(self.config)
        layer = moe.Qwen3_5MoeDecoderLayer if sparse else dense.Qwen3_5DecoderLayer
        norm = moe.Qwen3_5MoeRMSNorm if sparse else dense.Qwen3_5RMSNorm
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.mtp = Head(self.config, layer, norm)
        for name, p in self.named_parameters():
            if "norm" not in name and p.dim() >= 2 and "conv1d" not in name:
                nn.init.normal_(
                    p,
                    std=p.shape[-1] ** -0.5
                    * (0.3 if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")) else 1.0),
                )
        self.routers: list[tuple[Tensor, Tensor]] = []
        if sparse:
            for module in self.modules():
                if isinstance(module, moe.Qwen3_5MoeTopKRouter):
                    module.register_forward_hook(lambda _m, _a, out: self.routers.append((out[0], out[2])))

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the trunk, and of the head's first and second step: [B, T, V] each, aligned so that row t of all three
        predicts tokens t+1, t+2 and t+3."""
        self.routers.clear()
        hidden = self.trunk(input_ids=tokens_BT, use_cache=False).last_hidden_state
        positions = torch.arange(tokens_BT.shape[1])[None].expand(3, tokens_BT.shape[0], -1)
        rope = self.trunk.rotary_emb(hidden, positions)
        embedded = self.trunk.embed_tokens(tokens_BT)
        first = self.mtp(hidden, embedded.roll(-1, 1), rope)
        second = self.mtp(first, embedded.roll(-2, 1), rope)
        return self.lm_head(hidden), self.lm_head(first), self.lm_head(second)

    def balance(self) -> Tensor:
        """Switch-style load balancing over all routers of the last forward (1 is perfect balance)."""
        if not self.routers:
            return torch.zeros(())
        terms = []
        for logits, chosen in self.routers:
            share = F.one_hot(chosen, logits.shape[-1]).float().sum(1).mean(0) / chosen.shape[-1]
            terms.append(logits.shape[-1] * (share * logits.float().softmax(-1).mean(0)).sum())
        return torch.stack(terms).mean()


def losses(network: Network, tokens_BT: Tensor) -> tuple[Tensor, list[float], list[float]]:
    """The training loss, the three cross-entropies in nats, and greedy agreement of the head's two steps with the trunk."""
    logits = network(tokens_BT)
    cross = []
    for ahead, step in enumerate(logits, start=1):
        cross.append(F.cross_entropy(step[:, :-ahead].flatten(0, 1), tokens_BT[:, ahead:].flatten()))
    own = logits[0].argmax(-1)
    agree = [(logits[k].argmax(-1)[:, :-k] == own[:, k:]).float().mean().item() for k in (1, 2)]
    total = cross[0] + 0.3 * cross[1] + 0.1 * cross[2] + 0.01 * network.balance()
    return total, [c.item() for c in cross], agree
