"""GGUF: one file with metadata, tokenizer and tensors, for llama.cpp and all that stands on it.

    plan = plan_gguf(source, map_of(source), file_type="Q4_K_M", overrides=[Override("mtp.*", "Q8_0")])
    plan.tensor_bytes, plan.notes                                 # from names and shapes alone
    write_gguf(plan, source, Path("model-Q4_K_M.gguf"))           # see gguf_writer

The files that a release may have: the model (its MTP head included), the model without it, the head alone as a draft, and the tower (`mmproj`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qwench.checkpoint.source import TensorSource
from qwench.errors import PlanError, suggestion
from qwench.formats.gguf_fields import Field, architecture, text_fields, vision_fields
from qwench.formats.gguf_tensors import Content, GgufTensor, gguf_tensors
from qwench.formats.gguf_tokenizer import tokenizer_fields
from qwench.formats.gguf_types import FILE_TYPES, TYPES, UNQUANTIZED, Mix, Override, block_size, fitting, tensor_bytes
from qwench.models.geometry import read_geometry
from qwench.models.map import ModelMap

__all__ = ["ALIGNMENT", "Content", "GgufPlan", "Override", "PlannedTensor", "fields_of", "plan_gguf"]

ALIGNMENT = 32
"""Every tensor begins at a multiple of so many bytes behind the header."""
VISION_TYPES = (*UNQUANTIZED, "Q8_0")
"""What the tower can be stored in: llama.cpp's converter makes no others, and quantizers leave it alone."""
FLOAT16 = (
    "F16: llama.cpp rounds what it multiplies with F16 matrices to float16, which Gated DeltaNet's values overflow: prefer BF16"
)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor with its type.

    Attributes:
        tensor: what it is made of.
        type: how it is stored: `F32`, `BF16`, `Q4_K` ...
        wanted: what the mix or an override meant; differs where its blocks do not divide the rows.
    """

    tensor: GgufTensor
    type: str
    wanted: str

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.type, self.tensor.shape)

    @property
    def parameters(self) -> int:
        return math.prod(self.tensor.shape)


@dataclass(frozen=True)
class GgufPlan:
    """A file before its first byte.

    Attributes:
        content: what is in it.
        file_type: its mix.
        name: of the model, for people.
        tensors: in the file's order.
        notes: fallbacks and warnings; one sentence each.
        map: of the source.
    """

    content: Content
    file_type: str
    name: str
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]
    map: ModelMap = field(repr=False)

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the network."""
        return architecture(self.map, self.content)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the file behind its header."""
        return sum(padded(t.nbytes) for t in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(t.parameters for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(t.nbytes for t in self.tensors) / self.parameters


def padded(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_gguf(
    source: TensorSource,
    map: ModelMap,
    *,
    file_type: str = "BF16",
    content: Content = "model",
    overrides: Sequence[Override] = (),
    importance: bool = False,
    name: str = "",
) -> GgufPlan:
    """Every tensor of a file with its type, from names and shapes alone.

    Args:
        source: a checkpoint, a release, or a sketch from a config.
        map: its map.
        file_type: a key of `gguf_types.FILE_TYPES`.
        content: what goes into the file. `model` of a checkpoint without an MTP head is the same as `trunk`.
        overrides: types for roles; later ones win.
        importance: whether an importance matrix will be used: some mixes depend on it.
        name: for people; the folder's name by default.

    Raises:
        PlanError: unknown types, overrides that nothing follows, a file type that the tower cannot have.
        CheckpointError: there is no head or no tower to write, or the config lacks a number.
    """
    if complaints := list(_unknown(file_type, content, overrides)):
        raise PlanError(complaints)
    tensors = gguf_tensors(source.config, map, content)
    if complaints := list(_without_effect(tensors, overrides)):
        raise PlanError(complaints)
    mix = _mix(source, map, tensors, file_type, importance)
    planned = tuple(_planned(t, file_type, mix, overrides) for t in tensors)
    notes = [*_notes(planned), *([FLOAT16] if file_type == "F16" and content != "vision" else [])]
    return GgufPlan(content, file_type, name or source.folder.name, planned, tuple(notes), map)


def fields_of(plan: GgufPlan, source: TensorSource) -> list[Field]:
    """The file's metadata, tokenizer included. Raises CheckpointError where the source's folder lacks a file that it is made from."""
    number = FILE_TYPES[plan.file_type][0]
    if plan.content == "vision":
        return vision_fields(source.config, source.folder, plan.name, number)
    rows = plan.map.other("embed").shape[0]
    return [
        *text_fields(source.config, plan.map, plan.content, plan.name, number),
        *tokenizer_fields(source.folder, source.config, rows),
    ]


def _unknown(file_type: str, content: Content, overrides: Sequence[Override]) -> Iterator[tuple[str, str]]:
    if file_type not in FILE_TYPES:
        yield f"{file_type!r} is no GGUF file type{suggestion(file_type, FILE_TYPES)}", f"use one of {', '.join(FILE_TYPES)}"
    elif content == "vision" and file_type not in VISION_TYPES:
        yield f"mmproj cannot be {file_type}: llama.cpp's tower has no such types", f"use one of {', '.join(VISION_TYPES)}"
    for override in overrides:
        if override.type not in TYPES:
            yield (
                f"{override.type!r}, meant for {override.roles}, is no type of a GGUF tensor{suggestion(override.type, TYPES)}",
                f"use one of {', '.join(TYPES)}",
            )


def _without_effect(tensors: Sequence[GgufTensor], overrides: Sequence[Override]) -> Iterator[tuple[str, str]]:
    for override in overrides:
        named = [t for t in tensors if override.names(t)]
        if not named:
            yield f"no tensor of the file has a role like {override.roles!r}", "see the roles in docs/recipes.md"
        elif all(t.float32 for t in named):
            yield f"{override.roles} is stored in F32 in every GGUF file", f"take {override.roles} out of the types"


def _mix(source: TensorSource, map: ModelMap, tensors: Sequence[GgufTensor], file_type: str, importance: bool) -> Mix:
    g, names = read_geometry(source.config), [t.name for t in tensors]
    return Mix(
        file_type,
        queries_per_key=g.queries // g.keys,
        experts=g.experts,
        blocks=len(map.blocks) + (len(map.mtp) if any(".nextn." in n for n in names) else 0),
        values=sum(n.endswith((".attn_v.weight", ".attn_qkv.weight")) for n in names),
        tied="output.weight" not in names,
        importance=importance,
    )


def _planned(tensor: GgufTensor, file_type: str, mix: Mix, overrides: Sequence[Override]) -> PlannedTensor:
    """One tensor's type. The mix is asked only for tensors that it decides on, as its rules count them."""
    wanted = FILE_TYPES[file_type][1]
    forced = next((o.type for o in reversed(overrides) if o.names(tensor)), None)
    if tensor.name.startswith("v.patch_embd.weight"):
        wanted = "F16" if file_type == "F16" else "F32"  # the convolution has kernels for these two
    elif tensor.float32:
        wanted = "F32"
    elif forced is not None:
        wanted = forced
    elif wanted not in UNQUANTIZED and not tensor.role.startswith("vision."):
        wanted = mix.choose(tensor)
    return PlannedTensor(tensor, fitting(wanted, tensor.columns), wanted)


def _notes(planned: Sequence[PlannedTensor]) -> Iterator[str]:
    """One sentence for all tensors that fall back in the same way."""
    alike: dict[tuple[str, str, int], list[str]] = {}
    for t in planned:
        if t.type != t.wanted:
            alike.setdefault((t.type, t.wanted, t.tensor.columns), []).append(t.tensor.role)
    for (kind, wanted, columns), roles in alike.items():
        what = "1 tensor is" if len(roles) == 1 else f"{len(roles)} tensors are"
        yield (
            f"{what} {kind} and not {wanted}, whose blocks of {block_size(wanted)} do not divide rows of {columns}: "
            f"{', '.join(dict.fromkeys(roles))}"
        )
