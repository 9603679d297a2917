"""The multi-token-prediction (MTP) head: one more decoder layer that drafts the token after the next.

    x_t = fc([norm_e(embedding of token t+1) ; norm_h(h_t)])          h_t: the trunk's hidden state after its final norm
    m_t = norm(layer(x_t))                                            the trunk's lm_head turns m_t into a draft of token t+2

Drafting further, the head reads its own m_t in place of h_t and the next token's embedding, one position on. In an engine each draft step appends one
entry to the head's KV cache; the entries at accepted positions are overwritten from the trunk's hidden states before the next round. So step j that
starts at position t attends to the entries of step 1 at positions <= t, and to those of steps 2 .. j that started at t. `drafts` computes exactly
this for all t of a row at once, with the text's own tokens in place of the drafted ones (teacher forcing). `begin` gives the engine's way: one sequence, its
cache, one draft after the other.

The formula is that of the published checkpoints' engines (vLLM's `qwen3_5_mtp`); transformers has no MTP head.

Letters in names: B rows, T positions, D hidden size, H heads, G key-value heads, A width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb

from qwench.checkpoint.source import TensorSource
from qwench.errors import CheckpointError
from qwench.models.cache import KeyValues, causal_mask
from qwench.models.inputs import round_inputs, rounded_inputs
from qwench.models.map import ModelMap
from qwench.models.modules import Modules, lend, text_positions
from qwench.models.place import CPU
from qwench.models.weights import read_block, read_slot
from qwench.numerics import InputRounding

QUERIES = 256
"""Positions whose attention scores are held at once."""

KeysValues = tuple[Tensor, Tensor]
"""Keys after norm and rotation, and values: [B, G, positions, A] each."""


class HeadReading:
    """One sequence as the head reads it, with its cache: entry t was made of the hidden state at position t and the token at t + 1."""

    def __init__(self, head: MtpHead) -> None:
        self._head, self._memory = head, KeyValues()

    @property
    def length(self) -> int:
        """Entries in the cache: the position that the next one stands for."""
        return self._memory.length

    @torch.no_grad()
    def read(self, hidden_TD: Tensor, embedded_TD: Tensor) -> Tensor:
        """Add entries, and say what each of them drafts from.

        Args:
            hidden_TD: the trunk's hidden states after its final norm at the next positions; or, for one position, what the last `read` returned for the one before.
            embedded_TD: the embedding of the token that comes after each.

        Returns:
            The head's hidden states after its own norm [T, D]: lm_head turns the last into a draft.
        """
        return self._head.extend(hidden_TD[None], embedded_TD[None], self._memory)[0]

    def rewind(self, length: int) -> None:
        """Forget the entries from position `length` on: those of drafts, before the trunk's own hidden states take their places."""
        self._memory.rewind(length)


class MtpHead:
    """The head of a checkpoint; it keeps its weights from first use until `free`: one layer and fc. Hidden states that it reads may be anywhere; its own are on its device.

    Raises:
        CheckpointError: the checkpoint has no head, or one of several layers.
    """

    def __init__(
        self, source: TensorSource, map: ModelMap, dtype: torch.dtype = torch.float32, device: torch.device = CPU.device
    ) -> None:
        if len(map.mtp) != 1:
            what = f"its MTP head has {len(map.mtp)} layers" if map.mtp else "it has no MTP head"
            raise CheckpointError(
                f"{source.folder}: {what}, one layer can be run", "take the mtp.* tensors of the original checkpoint"
            )
        self.source, self.map, self.dtype, self.device = source, map, dtype, device
        self.modules = Modules(source.config, map)
        self._layer: Any = None
        self._own: dict[str, Tensor] = {}
        self._fc_rounding: InputRounding | None = None

    @torch.no_grad()
    def drafts(self, hidden_BTD: Tensor, embedded_BTD: Tensor, steps: int, positions_3BT: Tensor | None = None) -> list[Tensor]:
        """Hidden states of the head at draft steps 1 .. `steps`.

        Args:
            hidden_BTD: the trunk's hidden states after the final norm.
            embedded_BTD: the embeddings of the same tokens.
            steps: how far to draft; less than T.
            positions_3BT: positions of the tokens; None: 0, 1, 2 ... as in text.

        Returns:
            One tensor [B, T - j, D] for each step j, after the head's norm: entry t has read token t + j and drafts token t + j + 1.
        """
        length = hidden_BTD.shape[1]
        assert 1 <= steps < length, "a step reads the token that many positions on"
        self._load()
        positions = text_positions(length).expand(3, len(hidden_BTD), length) if positions_3BT is None else positions_3BT
        rows = [
            self._row(self._here(hidden_BTD[b : b + 1]), self._here(embedded_BTD[b : b + 1]), steps, positions[:, b : b + 1])
            for b in range(len(hidden_BTD))
        ]
        return [torch.cat(step) for step in zip(*rows, strict=True)]

    def begin(self) -> HeadReading:
        """A sequence of which the head has read nothing."""
        return HeadReading(self)

    @torch.no_grad()
    def extend(self, hidden_1TD: Tensor, embedded_1TD: Tensor, memory: KeyValues) -> Tensor:
        """Hidden states of the head [1, T, D] for the positions that follow those in `memory`, to which their entries are added."""
        x = self.combine(self._here(hidden_1TD), self._here(embedded_1TD))
        end = memory.length + x.shape[1]
        rope = self.modules.rope(text_positions(end)[..., memory.length :], x)
        mask = causal_mask(x.shape[1], end, self.device)
        return self._norm("final", self._layer(x, position_embeddings=rope, attention_mask=mask, past_key_values=memory))

    def free(self) -> None:
        """Let go of the weights; the next use reads them again."""
        self._layer, self._own = None, {}

    def _here(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)

    def _row(self, hidden: Tensor, embedded: Tensor, steps: int, positions: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        cached: list[KeysValues] = []
        for step in range(1, steps + 1):
            count = hidden.shape[1] - 1 if step == 1 else found[-1].shape[1] - 1
            before = hidden if step == 1 else found[-1]
            x = self.combine(before[:, :count], embedded[:, step : step + count])
            mixed, own = self._attention(x, positions[..., :count] + step - 1, cached)
            cached.append(own)
            found.append(self._rest(x + mixed))
        return found

    def combine(self, hidden_BTD: Tensor, embedded_BTD: Tensor) -> Tensor:
        """What the layer reads: fc of the two normed halves, the embedding's first."""
        self._load()
        halves = self._norm("embedding", embedded_BTD), self._norm("hidden", hidden_BTD)
        pair = torch.cat(halves, dim=-1)
        return F.linear(self._fc_rounding(pair) if self._fc_rounding else pair, self._own["mtp.fc"])

    def _attention(self, x: Tensor, positions: Tensor, cached: list[KeysValues]) -> tuple[Tensor, KeysValues]:
        """The layer's attention with its output gate, and the keys and values that it adds to the cache."""
        attention, normed = self._layer.self_attn, self._layer.input_layernorm(x)
        heads = (*x.shape[:2], -1, attention.head_dim)
        query, gate = attention.q_proj(normed).view(*x.shape[:2], -1, 2 * attention.head_dim).chunk(2, dim=-1)
        query = attention.q_norm(query).transpose(1, 2)
        key = attention.k_norm(attention.k_proj(normed).view(heads)).transpose(1, 2)
        value = attention.v_proj(normed).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *self.modules.rope(positions, x))
        read = attend(query, [*cached, (key, value)], attention.scaling)
        gated = read.transpose(1, 2).flatten(2) * gate.flatten(2).sigmoid()
        return attention.o_proj(gated), (key, value)

    def _rest(self, x: Tensor) -> Tensor:
        """The layer's MLP, and the head's norm."""
        return self._norm("final", x + self._layer.mlp(self._layer.post_attention_layernorm(x)))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return lend(self.modules.norm, {"weight": self._own[f"mtp.norm.{name}"]}, x)

    def _load(self) -> None:
        if self._layer is None:
            self._own = {
                s.role: read_slot(self.source, s, self.dtype, self.device) for s in self.map.others if s.role.startswith("mtp.")
            }
            layer, block, fc = self.modules.new_layer("full_attention"), self.map.mtp[0], self.map.other("mtp.fc")
            layer.load_state_dict(read_block(self.source, block, "mtp.layers.0.", self.dtype, self.device), assign=True)
            round_inputs(layer, block.slots, "mtp.layers.0.", rounded_inputs(self.source, block.slots))
            self._layer, self._fc_rounding = layer, rounded_inputs(self.source, [fc]).get(fc.module)


def attend(query_BHTA: Tensor, cache: list[KeysValues], scaling: float) -> Tensor:
    """What each query reads: the first entry of the cache up to its own position, and of every later entry its own position alone.

    With one entry this is causal attention. Entries may reach further than the queries; query t belongs to position t of each.

    Returns:
        [B, H, T, A].
    """
    heads, count = query_BHTA.shape[1], query_BHTA.shape[2]
    first, *later = [(_shared(keys, heads, count), _shared(values, heads, count)) for keys, values in cache]
    parts = []
    for start in range(0, count, QUERIES):
        stop = min(start + QUERIES, count)
        query = query_BHTA[:, :, start:stop]
        scores = query @ first[0][:, :, :stop].transpose(2, 3) * scaling
        places = torch.arange(stop, device=query.device)
        future = places > places[start:, None]
        own = [(query * keys[:, :, start:stop]).sum(-1, keepdim=True) * scaling for keys, _ in later]
        weights = (
            torch.cat([scores.masked_fill(future, float("-inf")), *own], dim=-1)
            .softmax(-1, dtype=torch.float32)
            .to(query.dtype)
        )
        read = weights[..., :stop] @ first[1][:, :, :stop]
        for place, (_, values) in enumerate(later, start=stop):
            read = read + weights[..., place : place + 1] * values[:, :, start:stop]
        parts.append(read)
    return torch.cat(parts, dim=2)


def _shared(x_BGTA: Tensor, heads: int, count: int) -> Tensor:
    """The first positions, each key-value head once for every query head that reads it: [B, H, count, A]."""
    return x_BGTA[:, :, :count].repeat_interleave(heads // x_BGTA.shape[1], dim=1)
