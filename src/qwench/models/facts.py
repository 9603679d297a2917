"""What a checkpoint is, as plain data: `qwench inspect` prints it.

Weights are counted as stored. Memory in use beside them is computed from the shapes:

- KV cache: keys and values of the layers with full attention (and of the MTP head, where it drafts), for every position.
- Recurrent state of Gated DeltaNet, for every sequence and whatever its length: one matrix [key width, value width] for each value head, in the config's
  `mamba_ssm_dtype` (float32 in published configs), and the last kernel - 1 inputs of the convolution, in the model's dtype.

Activations, CUDA graphs and an engine's own buffers are not in these numbers; `max_context` sets a reserve aside for them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

from qwench.checkpoint.source import TensorEntry, TensorSource
from qwench.models import Survey, survey
from qwench.models.geometry import Complaint, Geometry, LayerKind, read_geometry, text_config
from qwench.models.map import Block, ModelMap
from qwench.models.tables import CONDITIONAL

KINDS: tuple[LayerKind, ...] = get_args(LayerKind)
KvDtype = Literal["float32", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
ELEMENT: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of one element, by the names that engines and configs use."""

COMPONENTS = ("embed", "attention", "delta", "mlp", "experts", "shared", "router", "norms", "head", "mtp", "vision", "other")
"""The order of `Facts.components`. `router` holds the shared expert's gate too; `other` is what plays no role."""

RESERVE = 2**30
"""Bytes that `max_context` leaves to activations and the engine."""


@dataclass(frozen=True)
class ComponentFacts:
    """Stored tensors, parameters and bytes of one component."""

    component: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Facts:
    """A checkpoint, described.

    Attributes:
        model_type: `qwen3_5` or `qwen3_5_moe`.
        layout: `conditional generation` or `text-only causal LM`.
        experts: how experts are stored, `fused`, `one by one` or `mixed`, in `trunk` and `mtp`; empty for a dense model.
        pattern: the mixers in order, as runs: `8 x (3 linear_attention, 1 full_attention)`.
        layers: decoder layers by mixer.
        tied: the head is the embedding.
        mtp: `present`, `missing` (announced by the config, not stored), `incomplete`, or `none`.
        vision: `present`, `missing`, `incomplete` or `none`, likewise.
        complaints: what is wrong with the checkpoint, (what, mend).
        components: see COMPONENTS; those that the checkpoint lacks are left out.
        dtypes: bytes stored in each safetensors dtype, largest first.
        files: number of files.
        context: positions that the model was made for; 0 where the config does not say.
        geometry: its dimensions.
        state_dtype, convolution_dtype: dtypes of the recurrent state and of the convolution's.
    """

    model_type: str
    layout: str
    experts: dict[str, str]
    pattern: str
    layers: dict[str, int]
    tied: bool
    mtp: str
    vision: str
    complaints: tuple[Complaint, ...]
    components: tuple[ComponentFacts, ...]
    dtypes: dict[str, int]
    files: int
    context: int
    geometry: Geometry
    state_dtype: str = "float32"
    convolution_dtype: str = "bfloat16"

    @property
    def tensors(self) -> int:
        return sum(c.tensors for c in self.components)

    @property
    def parameters(self) -> int:
        return sum(c.parameters for c in self.components)

    @property
    def bytes(self) -> int:
        return sum(c.bytes for c in self.components)

    def kv_bytes(self, context: int, batch: int = 1, dtype: KvDtype = "bfloat16", *, mtp: bool = False) -> int:
        """KV cache of `batch` sequences of `context` tokens; `mtp`: with the head's own layer."""
        layers = self.layers["full_attention"] + (1 if mtp and self.mtp == "present" else 0)
        return layers * 2 * self.geometry.keys * ELEMENT[dtype] * context * batch

    def state_bytes(self, batch: int = 1) -> int:
        """Recurrent and convolution state of `batch` sequences."""
        g = self.geometry
        recurrent = g.delta_heads * g.delta_head_key * g.delta_head_value * ELEMENT[self.state_dtype]
        convolution = g.convolved * (g.kernel - 1) * ELEMENT[self.convolution_dtype]
        return self.layers["linear_attention"] * (recurrent + convolution) * batch

    def max_context(
        self, memory: int, batch: int = 1, dtype: KvDtype = "bfloat16", *, mtp: bool = False, reserve: int = RESERVE
    ) -> int | None:
        """Tokens of context that each of `batch` sequences can have in `memory` bytes, beside all stored weights and a reserve.

        Returns:
            At most the model's own context (where the config states one); None where the weights and states alone do not fit.
        """
        left = memory - reserve - self.bytes - self.state_bytes(batch)
        if left < 0:
            return None
        tokens = left // self.kv_bytes(1, batch, dtype, mtp=mtp)
        return min(tokens, self.context) if self.context else tokens


def facts(source: TensorSource, found: Survey | None = None) -> Facts:
    """Describe a checkpoint, a damaged one too. Raises CheckpointError where its config cannot be read.

    Args:
        found: what `models.survey` makes of it, where that is known already.
    """
    found = found or survey(source)
    g, text, map = read_geometry(source.config), text_config(source.config), found.map
    state, model = str(text.get("mamba_ssm_dtype")), str(text.get("dtype") or text.get("torch_dtype"))
    return Facts(
        model_type=map.model_type,
        layout="conditional generation" if map.prefix == CONDITIONAL else "text-only causal LM",
        experts={
            where: words for where, blocks in (("trunk", map.blocks), ("mtp", map.mtp)) if (words := expert_words(blocks))
        },
        pattern=pattern_words(g.kinds),
        layers={kind: g.kinds.count(kind) for kind in KINDS},
        tied=map.tied,
        mtp=found.mtp,
        vision=found.vision,
        complaints=found.complaints,
        components=tuple(_components(source, map)),
        dtypes=_dtypes(source.tensors.values()),
        files=len({e.file for e in source.tensors.values() if e.file}),
        context=g.context,
        geometry=g,
        state_dtype=state if state in ELEMENT else "float32",
        convolution_dtype=model if model in ELEMENT else "bfloat16",
    )


def pattern_words(kinds: Iterable[str]) -> str:
    """The mixers as a person says them: the shortest period that repeats, with its runs."""
    every = list(kinds)
    period = next(p for p in range(1, len(every) + 1) if len(every) % p == 0 and every == every[:p] * (len(every) // p))
    runs = ", ".join(f"{len(list(run))} {kind}" for kind, run in groupby(every[:period]))
    return f"{len(every) // period} x ({runs})"


def expert_words(blocks: Iterable[Block]) -> str:
    """How the experts of some layers are stored; nothing where there are none."""
    fused = {bool(slot.part) for block in blocks for slot in block.slots if slot.expert is not None}
    if not fused:
        return ""
    return "mixed" if len(fused) == 2 else "fused" if fused.pop() else "one by one"


def component_of(role: str) -> str:
    """The component that a role counts to."""
    first = role.partition(".")[0]
    if role == "shared.router":
        return "router"
    return {"norm": "norms", "expert": "experts"}.get(first, first)


def _components(source: TensorSource, map: ModelMap) -> Iterator[ComponentFacts]:
    role_of = {slot.tensor: slot.role for slot in map.slots()}
    groups: dict[str, list[TensorEntry]] = {name: [] for name in COMPONENTS}
    for name, entry in source.tensors.items():
        groups[component_of(role_of.get(name, "other"))].append(entry)
    for name, entries in groups.items():
        if entries:
            yield ComponentFacts(name, len(entries), sum(math.prod(e.shape) for e in entries), sum(e.nbytes for e in entries))


def _dtypes(entries: Iterable[TensorEntry]) -> dict[str, int]:
    stored: Counter[str] = Counter()
    for entry in entries:
        stored[entry.dtype] += entry.nbytes
    return dict(stored.most_common())
