"""Running a network block by block, with one block in memory.

    trunk = Trunk(source, map_of(source))
    hidden = trunk.forward(ids)                # [B, T, D], after the final norm
    logits = trunk.logits(hidden[:, -1])       # [B, V]

The modules are those of transformers, lent the weights that the map finds, whatever the layout: equal to the model that transformers would load,
which a test holds them to. Where the source says that linear layers read rounded inputs, they do (see `inputs`). Compute is float32 unless asked otherwise; never float16, which Gated DeltaNet overflows.

Letters in names: B rows, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from qwench.checkpoint.source import TensorSource
from qwench.errors import CheckpointError, UserError
from qwench.models.inputs import rounded_inputs, rounding_inputs
from qwench.models.map import ModelMap
from qwench.models.modules import Modules, lend, text_positions
from qwench.models.place import CPU, Place
from qwench.models.weights import read_block, read_rows, read_slot

POSITIONS = 4096
"""Positions that go through a block at once: enough to fill the machine, few enough that activations stay small beside the weights."""
VOCABULARY_ROWS = 16_384
"""Rows of the head that are converted to the compute dtype at once."""


class Trunk:
    """The decoder of a checkpoint, its head included.

    Args:
        source: where the weights are.
        map: which of them does what.
        dtype: what to compute in: float32 or bfloat16.
        device: what to compute on. Hidden states come back to where they came from; logits stay on it.

    Raises:
        UserError: float16.
        CheckpointError: transformers refuses the config.
    """

    def __init__(
        self, source: TensorSource, map: ModelMap, dtype: torch.dtype = torch.float32, device: torch.device = CPU.device
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"{dtype} cannot hold the intermediate values of Gated DeltaNet", "compute in float32 or bfloat16")
        self.source, self.map, self.dtype, self.device = source, map, dtype, device
        self.modules = Modules(source.config, map)
        self._head: Tensor | None = None

    @property
    def place(self) -> Place:
        """Where it computes, and in which numbers."""
        return Place(self.device, self.dtype)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.map.other("embed").shape[0]

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Embeddings [B, T, D] of token ids, on the processor; only the rows that occur are read. Raises CheckpointError for an id outside of the vocabulary."""
        if ids_BT.numel() and not 0 <= int(ids_BT.min()) <= int(ids_BT.max()) < self.vocabulary:
            raise CheckpointError(
                f"token ids run from {int(ids_BT.min())} to {int(ids_BT.max())}, the embedding has {self.vocabulary} rows",
                "use the tokenizer that belongs to this checkpoint",
            )
        return read_rows(self.source, self.map.other("embed"), ids_BT, self.dtype)

    @torch.no_grad()
    def run_block(self, index: int, hidden_BTD: Tensor, positions_3BT: Tensor | None = None) -> Tensor:
        """Hidden states after decoder layer `index`, [B, T, D]. Its weights are read, used on all rows, and dropped.

        Args:
            hidden_BTD: hidden states before it; a row is a sequence, its first position attends to itself alone.
            positions_3BT: positions for the rotary embedding (time, height, width); None: 0, 1, 2 ... as in text.

        Raises:
            CheckpointError: from the source.
        """
        block, stem = self.map.blocks[index], f"{self.map.prefix}layers.{index}."
        weights = read_block(self.source, block, stem, self.dtype, self.device)
        rounded = rounded_inputs(self.source, block.slots)
        layer, hidden_BTD = self.modules.layer(block.kind), hidden_BTD.to(self.dtype)
        rows, length, _ = hidden_BTD.shape
        positions = text_positions(length).expand(3, rows, length) if positions_3BT is None else positions_3BT
        at_once, result = max(1, POSITIONS // length), torch.empty_like(hidden_BTD)
        with rounding_inputs(layer, block.slots, stem, rounded):
            for first in range(0, rows, at_once):
                some = slice(first, first + at_once)
                here = hidden_BTD[some].to(self.device)
                rope = self.modules.rope(positions[:, some], here)
                result[some] = lend(layer, weights, here, position_embeddings=rope, attention_mask=None)
        return result

    @torch.no_grad()
    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm of hidden states [..., D], where they are."""
        weight = read_slot(self.source, self.map.other("norm.final"), self.dtype, hidden.device)
        return lend(self.modules.norm, {"weight": weight}, hidden.to(self.dtype))

    def forward(self, ids_BT: Tensor, positions_3BT: Tensor | None = None, embedded_BTD: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, [B, T, D]; `embedded_BTD` takes the place of the embeddings (rows with images)."""
        hidden = self.embed(ids_BT) if embedded_BTD is None else embedded_BTD
        for index in range(len(self.map.blocks)):
            hidden = self.run_block(index, hidden, positions_3BT)
        return self.norm(hidden)

    @torch.no_grad()
    def logit_parts(self, hidden: Tensor, rows: int = VOCABULARY_ROWS) -> Iterator[tuple[slice, Tensor]]:
        """Logits of normed hidden states [..., D], a part of the vocabulary at a time: (its tokens, [..., tokens]), in the compute dtype."""
        head, hidden = self.head_weight(), hidden.to(self.device, self.dtype)
        for first in range(0, len(head), rows):
            part = slice(first, min(first + rows, len(head)))
            yield part, F.linear(hidden, head[part].to(self.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of normed hidden states [..., D], in the compute dtype. All of them at once: pass a few positions at a time."""
        result = torch.empty(*hidden.shape[:-1], self.vocabulary, dtype=self.dtype, device=self.device)
        for part, values in self.logit_parts(hidden):
            result[..., part] = values
        return result

    def greedy(self, hidden: Tensor) -> Tensor:
        """The most likely token of normed hidden states [..., D], int64 [...], on the processor, without ever holding all logits."""
        best = torch.full(hidden.shape[:-1], float("-inf"), dtype=self.dtype, device=self.device)
        token = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=self.device)
        for part, values in self.logit_parts(hidden):
            highest, where = values.max(-1)
            better = highest > best
            best, token = torch.where(better, highest, best), torch.where(better, where + part.start, token)
        return token.cpu()

    def free(self) -> None:
        """Let go of the head, which is otherwise kept (as it is stored) after its first use."""
        self._head = None

    def head_weight(self) -> Tensor:
        """The matrix [V, D] that makes logits, as it is stored, on the device; kept until `free`."""
        if self._head is None:
            slot = self.map.other("embed" if self.map.tied else "head")
            self._head = self.source.read(slot.tensor, slot.part).to(self.device)
        return self._head
