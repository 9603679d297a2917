"""Every tensor of a GGUF file, from names and shapes alone: what it is called, which weights it is made of, and what happens to them.

    mtp.layers.0.* becomes the block behind the last: blk.32.*, with the rest of the head as blk.32.nextn.*
    experts are stacked: blk.3.ffn_gate_exps.weight [experts, width, hidden], whichever way the checkpoint stores them
    the tower goes to a file of its own (`mmproj`), its patch embedding as one matrix per frame

Names and shapes are those that llama.cpp's `qwen35` and `qwen35moe` load (src/models/qwen35*.cpp), values those that its converter writes: the tests hold both
against it. Shapes are given as torch has them, [.., rows, columns]; GGUF's own listing is the reverse.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwench.errors import CheckpointError
from qwench.formats.gguf_transforms import Frame, NegativeExponential, PlusOne, Squeeze, TileHeads, Transform
from qwench.models.geometry import Geometry, read_geometry
from qwench.models.map import Block, ModelMap, Slot

Content = Literal["model", "trunk", "mtp", "vision"]
"""`model`: text with its MTP head, where it has one. `trunk`: without. `mtp`: the head alone, for use as a draft file. `vision`: the tower (mmproj)."""

TRUNK = {"embed": "token_embd.weight", "norm.final": "output_norm.weight", "head": "output.weight"}
LAYER = {
    "norm.input": "attn_norm.weight", "norm.post": "post_attention_norm.weight",
    "attention.q": "attn_q.weight", "attention.k": "attn_k.weight", "attention.v": "attn_v.weight", "attention.o": "attn_output.weight",
    "attention.q_norm": "attn_q_norm.weight", "attention.k_norm": "attn_k_norm.weight",
    "delta.qkv": "attn_qkv.weight", "delta.z": "attn_gate.weight", "delta.a": "ssm_alpha.weight", "delta.b": "ssm_beta.weight",
    "delta.out": "ssm_out.weight", "delta.conv": "ssm_conv1d.weight", "delta.A_log": "ssm_a", "delta.dt_bias": "ssm_dt.bias",
    "delta.norm": "ssm_norm.weight",
    "mlp.gate": "ffn_gate.weight", "mlp.up": "ffn_up.weight", "mlp.down": "ffn_down.weight",
    "router": "ffn_gate_inp.weight", "shared.router": "ffn_gate_inp_shexp.weight",
    "expert.gate": "ffn_gate_exps.weight", "expert.up": "ffn_up_exps.weight", "expert.down": "ffn_down_exps.weight",
    "shared.gate": "ffn_gate_shexp.weight", "shared.up": "ffn_up_shexp.weight", "shared.down": "ffn_down_shexp.weight",
}  # fmt: skip
HEAD = {
    "mtp.fc": "nextn.eh_proj.weight", "mtp.norm.embedding": "nextn.enorm.weight", "mtp.norm.hidden": "nextn.hnorm.weight",
    "mtp.norm.final": "nextn.shared_head_norm.weight",
}  # fmt: skip
"""Names behind `blk.N.` of what stands outside of the MTP layers."""

VISION = (
    (r"blocks\.(\d+)\.attn\.qkv", r"v.blk.\1.attn_qkv"), (r"blocks\.(\d+)\.attn\.proj", r"v.blk.\1.attn_out"),
    (r"blocks\.(\d+)\.mlp\.linear_fc1", r"v.blk.\1.ffn_up"), (r"blocks\.(\d+)\.mlp\.linear_fc2", r"v.blk.\1.ffn_down"),
    (r"blocks\.(\d+)\.norm([12])", r"v.blk.\1.ln\2"),
    (r"merger\.linear_fc1", "mm.0"), (r"merger\.linear_fc2", "mm.2"), (r"merger\.norm", "v.post_ln"),
    (r"pos_embed", "v.position_embd"), (r"patch_embed\.proj", "v.patch_embd"),
    (r"deepstack_merger_list\.(\d+)\.linear_fc([12])", r"v.deepstack.\1.fc\2"),
    (r"deepstack_merger_list\.(\d+)\.norm", r"v.deepstack.\1.norm"),
)  # fmt: skip
"""The tower's names without `.weight` and `.bias`."""

ALWAYS_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "v.position_embd.weight")
"""Matrices that llama.cpp keeps in float32 whatever the file's type is."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: in the file.
        role: of the weights that it is made of.
        shape: torch's order, [.., rows, columns].
        slots: the weights; several are stacked along a new first dimension (experts).
        transforms: what happens to each of them, in order.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    transforms: tuple[Transform, ...] = ()

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def by_rows(self) -> bool:
        return all(t.by_rows for t in self.transforms)

    @property
    def float32(self) -> bool:
        """Whether it is stored in float32 in every file: vectors, norms, routers and what llama.cpp has no other kernels for."""
        return len(self.shape) < 2 or self.name.endswith(("_norm.weight", *ALWAYS_FLOAT32)) or ".weight" not in self.name


def gguf_tensors(config: Mapping[str, Any], map: ModelMap, content: Content) -> list[GgufTensor]:
    """Every tensor of the file, in the order in which llama.cpp's quantizer goes through them: outside of blocks first, then block by block, by name.

    Raises:
        CheckpointError: the checkpoint has no MTP head or no tower to put there.
    """
    if content == "vision":
        return _vision(config, map)
    if content == "mtp" and not map.has_mtp:
        raise CheckpointError("the checkpoint has no MTP head, so no draft file can be made of it", "graft one first")
    g = read_geometry(config)
    found = list(_outside(map))
    if content != "mtp":
        for block in map.blocks:
            found += _block(g, block, block.index)
    if content != "trunk" and map.has_mtp:
        for block in map.mtp:
            found += _block(g, block, len(map.blocks) + block.index)
        found += _head(map)
    return sorted(found, key=lambda t: (block_of(t.name), t.name))


def block_of(name: str) -> int:
    """The number of the block in a tensor's name; -1 outside of blocks."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _outside(map: ModelMap) -> Iterator[GgufTensor]:
    for slot in map.others:
        if slot.role in TRUNK and not (slot.role == "head" and map.tied):
            transforms: tuple[Transform, ...] = (PlusOne(),) if slot.role == "norm.final" else ()
            yield GgufTensor(TRUNK[slot.role], slot.role, slot.shape, (slot,), transforms)


def _head(map: ModelMap) -> Iterator[GgufTensor]:
    """What stands outside of the MTP layers. `mtp.fc` has the embedding's half first, as llama.cpp wants it."""
    for slot in map.others:
        if slot.role in HEAD:
            transforms: tuple[Transform, ...] = (PlusOne(),) if slot.role.startswith("mtp.norm") else ()
            yield GgufTensor(f"blk.{len(map.blocks)}.{HEAD[slot.role]}", slot.role, slot.shape, (slot,), transforms)


def _block(g: Geometry, block: Block, number: int) -> Iterator[GgufTensor]:
    together: defaultdict[str, list[Slot]] = defaultdict(list)
    for slot in block.slots:
        together[slot.role].append(slot)
    for role, slots in together.items():
        slots.sort(key=lambda s: s.expert or 0)
        plain = role.removeprefix("mtp.")
        shape = (len(slots), *slots[0].shape) if slots[0].expert is not None else slots[0].shape
        if plain == "delta.conv":
            shape = (shape[0], shape[2])
        yield GgufTensor(f"blk.{number}.{LAYER[plain]}", role, shape, tuple(slots), _transforms(g, plain))


def _transforms(g: Geometry, role: str) -> tuple[Transform, ...]:
    """What a decoder layer's weight goes through. Where there is one value head for each key head, both orders are the same."""
    keys, values, width = g.delta_keys // g.delta_head_key, g.delta_heads, g.delta_head_value
    tiled: dict[str, TileHeads] = {}
    if keys != values:
        single = TileHeads(keys, values, 1)
        behind = TileHeads(keys, values, width, start=2 * g.delta_keys)
        tiled = {
            "delta.qkv": behind, "delta.conv": behind, "delta.z": TileHeads(keys, values, width), "delta.a": single, "delta.b": single,
            "delta.A_log": single, "delta.dt_bias": single, "delta.out": TileHeads(keys, values, width, dimension=-1),
        }  # fmt: skip
    first: dict[str, Transform] = {"delta.conv": Squeeze(), "delta.A_log": NegativeExponential()}
    if role.startswith("norm.") or role in ("attention.q_norm", "attention.k_norm"):
        first[role] = PlusOne()
    return tuple(t for t in (first.get(role), tiled.get(role)) if t is not None)


def _vision(config: Mapping[str, Any], map: ModelMap) -> list[GgufTensor]:
    if not map.has_vision:
        raise CheckpointError("the checkpoint has no vision tower, so no mmproj file can be made of it", "leave mmproj out")
    layers = config["vision_config"].get("deepstack_visual_indexes") or []
    slots = [s for s in map.others if s.role.startswith("vision.")]
    return [tensor for slot in slots for tensor in _tower(slot, layers)]


def _tower(slot: Slot, deepstack: Sequence[int]) -> Iterable[GgufTensor]:
    stem, _, kind = slot.role.removeprefix("vision.").rpartition(".")
    name = _vision_name(stem, deepstack)
    if name == "v.patch_embd" and kind == "weight":
        if slot.shape[2] != 2:
            raise CheckpointError(
                f"{slot.tensor} embeds {slot.shape[2]} frames at a time, llama.cpp knows 2", "leave mmproj out"
            )
        shape = (*slot.shape[:2], *slot.shape[3:])
        for frame, suffix in ((0, "weight"), (1, "weight.1")):
            yield GgufTensor(f"{name}.{suffix}", slot.role, shape, (slot,), (Frame(frame),))
        return
    yield GgufTensor(f"{name}.{kind}", slot.role, slot.shape, (slot,))


def _vision_name(stem: str, deepstack: Sequence[int]) -> str:
    """The tower's module in the file; DeepStack mergers are named by the block that they follow."""
    for pattern, name in VISION:
        if found := re.fullmatch(pattern, stem):
            if stem.startswith("deepstack"):
                return found.expand(name.replace(r"\1", str(deepstack[int(found[1])])))
            return found.expand(name)
    raise CheckpointError(f"vision.{stem} has no name in a GGUF file", "leave mmproj out")
