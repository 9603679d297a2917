"""Which tensor plays which role: the only place where the rest of the code learns names.

Checkpoints of one architecture come in several layouts: two prefixes (conditional generation, text-only causal LM) and experts fused in
3-D tensors or stored one by one, in any mixture. A `Slot` is one logical weight of the network wherever it is stored; a `Block` is one
decoder layer with what engines fuse in it; a `ModelMap` is the whole network. Maps are built from names and shapes alone.

Roles: `embed`, `head`, `norm.final`; in a decoder layer `norm.input`, `norm.post`, `attention.{q,k,v,o,q_norm,k_norm}`,
`delta.{qkv,z,a,b,out,conv,A_log,dt_bias,norm}`, `mlp.{gate,up,down}`, `router`, `expert.{gate,up,down}`, `shared.{gate,up,down}`, `shared.router`;
in the MTP head `mtp.fc`, `mtp.norm.{embedding,hidden,final}` and the decoder-layer roles behind `mtp.`; in the tower `vision.*`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from qwench.checkpoint.source import Part

LAYER_ROLES = (
    "norm.input", "norm.post",
    "attention.q", "attention.k", "attention.v", "attention.o", "attention.q_norm", "attention.k_norm",
    "delta.qkv", "delta.z", "delta.a", "delta.b", "delta.out", "delta.conv", "delta.A_log", "delta.dt_bias", "delta.norm",
    "mlp.gate", "mlp.up", "mlp.down",
    "router", "expert.gate", "expert.up", "expert.down", "shared.gate", "shared.up", "shared.down", "shared.router",
)  # fmt: skip
ROLES = (
    "embed", "head", "norm.final", *LAYER_ROLES,
    "mtp.fc", "mtp.norm.embedding", "mtp.norm.hidden", "mtp.norm.final", *(f"mtp.{role}" for role in LAYER_ROLES),
)  # fmt: skip
"""Every role but the tower's, whose roles are `vision.` and the rest of the stored name."""


@dataclass(frozen=True)
class Slot:
    """One logical weight.

    Attributes:
        role: what it does, see the module's list.
        module: the module path as engines and configs name it, without `.weight`, in the source's own prefix, experts always one by one:
            `model.language_model.layers.3.mlp.experts.7.gate_proj`. For parameters that are no `.weight` (A_log, dt_bias, biases) the
            full parameter name.
        shape: its logical shape; linear weights are (out, in).
        tensor: the stored tensor that holds it.
        part: the part of that tensor which is this weight; () is all of it.
        layer: decoder layer index (the MTP layers count from 0 again); None outside of layers.
        expert: expert index, or None.
        linear: whether it is the matrix of a linear layer. Which of these are never quantized (routers, decay gates) is the plan's business.
    """

    role: str
    module: str
    shape: tuple[int, ...]
    tensor: str
    part: Part = field(default=(), hash=False)  # slices have no hash in Python 3.11
    layer: int | None = None
    expert: int | None = None
    linear: bool = False


@dataclass(frozen=True)
class Fold:
    """Where a per-channel scale can move without changing the function: divide `source`'s output channels, multiply `readers`' columns.

    Attributes:
        source: role of what produces the channels (a norm, or a linear).
        readers: roles of every weight that reads them.
        zero_centred: the source is a norm that applies 1 + w.
        head: channels of a head, where readers may see the source's heads several times over, copies of a head side by side (v into o, when several
            query heads share a value head); None: readers see the source's channels one to one.
    """

    source: str
    readers: tuple[str, ...]
    zero_centred: bool
    head: int | None = None


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Attributes:
        index: its number in its stack.
        kind: which mixer it has.
        component: `text` or `mtp`.
        slots: its weights, in reading order.
        inputs: sets of linear modules that read the very same input (they share second moments), by name of that input: `attention`,
            `attention.o`, `delta`, `delta.out`, `mlp`, `mlp.down`, `shared.down`, `experts.7`, `experts.7.down`.
        fused: sets of linear modules that engines join into one (one scheme, one outer scale, one activation order), by fused name: `qkv_proj`,
            `gate_up_proj`, `in_proj_qkvz`, `in_proj_ba`, `shared_expert.gate_up_proj`, `experts.7.gate_up_proj`. And `experts`: all experts of
            the layer, which share a scheme but no scale.
        folds: where smoothing scales may go.
    """

    index: int
    kind: Literal["linear_attention", "full_attention"]
    component: Literal["text", "mtp"]
    slots: tuple[Slot, ...]
    inputs: dict[str, tuple[Slot, ...]] = field(default_factory=dict)
    fused: dict[str, tuple[Slot, ...]] = field(default_factory=dict)
    folds: tuple[Fold, ...] = ()

    @property
    def label(self) -> str:
        """The layer for a person: `layer 3`, `mtp layer 0`."""
        return f"{'mtp ' if self.component == 'mtp' else ''}layer {self.index}"

    def slot(self, role: str, expert: int | None = None) -> Slot:
        """The slot of a role in this block. Raises KeyError where the block has none."""
        for slot in self.slots:
            if slot.role == role and slot.expert == expert:
                return slot
        raise KeyError(role if expert is None else f"{role}[{expert}]")


@dataclass(frozen=True)
class ModelMap:
    """The whole network.

    Attributes:
        model_type: `qwen3_5` or `qwen3_5_moe` (whatever the layout).
        prefix: the text trunk's prefix: `model.language_model.` or `model.`.
        blocks: the decoder layers.
        mtp: the layers of the multi-token-prediction head (empty where the checkpoint has none).
        others: slots outside of layers: embedding, head, final norm, MTP's own, the tower's.
        tied: the head is the embedding.
    """

    model_type: str
    prefix: str
    blocks: tuple[Block, ...]
    mtp: tuple[Block, ...]
    others: tuple[Slot, ...]
    tied: bool

    def slots(self) -> Iterator[Slot]:
        """Every slot of the network."""
        for block in (*self.blocks, *self.mtp):
            yield from block.slots
        yield from self.others

    def other(self, role: str) -> Slot:
        """The slot of a role outside of layers. Raises KeyError where there is none."""
        for slot in self.others:
            if slot.role == role:
                return slot
        raise KeyError(role)

    @property
    def has_mtp(self) -> bool:
        return bool(self.mtp)

    @property
    def has_vision(self) -> bool:
        return any(s.role.startswith("vision.") for s in self.others)
