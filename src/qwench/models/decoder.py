"""Reading a sequence bit by bit: what generation needs, and `Trunk.forward`, which starts over each time, does not give.

    decoder = Decoder(Trunk(source, map_of(source)))
    reading = decoder.begin()
    hidden = reading.read(prompt)                        # [T, D], after the final norm
    hidden = reading.read([token, draft, other], keep=True)
    reading.rewind(len(prompt) + 1)                      # as if the two drafts had never been read

Weights are used again for every token. Blocks are kept, in the compute dtype, as long as they fit a stated limit; the others are read again each time they are needed, so
that memory stays bounded by the limit and one block, and a model of any size decodes, slowly. What is read is any `TensorSource`: a release is decoded from
its own bytes.

The result equals `Trunk.forward` up to rounding: matrix products over one position and over many add in another order.

Letters in names: T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwench.models.cache import DeltaStates, KeyValues, causal_mask
from qwench.models.delta import first_state, read_delta
from qwench.models.inputs import round_inputs, rounded_inputs
from qwench.models.map import Block
from qwench.models.modules import lend, text_positions
from qwench.models.run import Trunk
from qwench.models.weights import read_block, read_slot

KEPT = 8 * 2**30
"""Bytes of weights that a decoder keeps if nothing else is said."""


class Decoder:
    """A trunk that is used token by token.

    Args:
        trunk: what is run; its head is kept here in the compute dtype where the limit allows.
        keep: bytes of weights, in the compute dtype, that may stay in memory: the head first, then blocks in order.
    """

    def __init__(self, trunk: Trunk, keep: int = KEPT) -> None:
        self.trunk, self.keep = trunk, keep
        self._layers: dict[int, Any] = {}
        self._head: Tensor | None = None
        self._norm: Tensor | None = None
        self._free = keep

    @property
    def kept_bytes(self) -> int:
        """Bytes of weights in memory, the final norm aside."""
        return self.keep - self._free

    def begin(self) -> Reading:
        """A sequence of which nothing has been read."""
        return Reading(self)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of normed hidden states [..., D], in the compute dtype."""
        if self._head is None and self._fits(math.prod(self._head_shape())):
            self._head = self.trunk.head_weight().to(self.trunk.dtype)
            self.trunk.free()
        return (
            self.trunk.logits(hidden)
            if self._head is None
            else F.linear(hidden.to(self.trunk.device, self.trunk.dtype), self._head)
        )

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm of hidden states [..., D]."""
        if self._norm is None:
            norm, device = self.trunk.map.other("norm.final"), self.trunk.device
            self._norm = read_slot(self.trunk.source, norm, self.trunk.dtype, device)
        return lend(self.trunk.modules.norm, {"weight": self._norm}, hidden)

    def layer(self, index: int) -> Any:
        """Decoder layer `index` of transformers with its weights: kept, or read for this call. Raises CheckpointError from the source."""
        if index in self._layers:
            return self._layers[index]
        block = self.trunk.map.blocks[index]
        layer = self.trunk.modules.new_layer(block.kind)
        stem = f"{self.trunk.map.prefix}layers.{index}."
        weights = read_block(self.trunk.source, block, stem, self.trunk.dtype, self.trunk.device)
        layer.load_state_dict(weights, assign=True)
        round_inputs(layer, block.slots, stem, rounded_inputs(self.trunk.source, block.slots))
        if self._fits(_parameters(block)):
            self._layers[index] = layer
        return layer

    def free(self) -> None:
        """Let go of all weights; they are read again when they are needed."""
        self._layers, self._head, self._norm, self._free = {}, None, None, self.keep
        self.trunk.free()

    def _head_shape(self) -> tuple[int, ...]:
        return self.trunk.map.other("embed" if self.trunk.map.tied else "head").shape

    def _fits(self, parameters: int) -> bool:
        """Whether so many parameters may stay; they are counted if so."""
        needed = parameters * self.trunk.dtype.itemsize
        if needed > self._free:
            return False
        self._free -= needed
        return True


class Reading:
    """One sequence: what a decoder has read of it, and what it remembers.

    Attributes:
        length: tokens read.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.length = decoder, 0
        self._memories: dict[int, KeyValues | DeltaStates] = {}

    @torch.no_grad()
    def read(self, tokens: Sequence[int], keep: bool = False) -> Tensor:
        """Read tokens on from where the last ones ended.

        Args:
            tokens: at least one.
            keep: so that `rewind` can go back to any position from the first of them on. Memory: one recurrent state for each token and layer.

        Returns:
            Hidden states after the final norm, [T, D], on the device.

        Raises:
            CheckpointError: a token outside of the vocabulary, or from the source.
        """
        assert tokens, "there is nothing to read"
        trunk = self.decoder.trunk
        hidden = trunk.embed(torch.tensor([tokens])).to(trunk.device)
        positions = text_positions(self.length + len(tokens))[..., self.length :]
        rope = trunk.modules.rope(positions, hidden)
        for index, block in enumerate(trunk.map.blocks):
            layer = self.decoder.layer(index)
            hidden = (self._delta if block.kind == "linear_attention" else self._attention)(index, layer, hidden, rope, keep)
        self.length += len(tokens)
        return self.decoder.norm(hidden)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of normed hidden states [..., D], the trunk's or its MTP head's."""
        return self.decoder.logits(hidden)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Embeddings [T, D] of tokens."""
        return self.decoder.trunk.embed(torch.tensor(tokens))

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens; the last `read` must have kept what that takes."""
        for memory in self._memories.values():
            memory.rewind(length)
        self.length = length

    def _attention(self, index: int, layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], keep: bool) -> Tensor:
        memory = self._memories.setdefault(index, KeyValues())
        mask = causal_mask(hidden.shape[1], self.length + hidden.shape[1], hidden.device)
        result: Tensor = layer(hidden, position_embeddings=rope, attention_mask=mask, past_key_values=memory)
        return result

    def _delta(self, index: int, layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], keep: bool) -> Tensor:
        if index not in self._memories:
            self._memories[index] = DeltaStates(first_state(layer.linear_attn))
        memory = self._memories[index]
        assert isinstance(memory, DeltaStates)
        mixed, kept = read_delta(layer.linear_attn, layer.input_layernorm(hidden), memory.current, keep)
        memory.advance(hidden.shape[1], kept)
        hidden = hidden + mixed
        result: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return result


def _parameters(block: Block) -> int:
    return sum(math.prod(slot.shape) for slot in block.slots)
