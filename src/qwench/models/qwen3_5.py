"""The map of a Qwen3.5 checkpoint (Qwen3.6 and Qwen3.8 use the same classes), and the checkpoint that a config describes.

Nothing is lost in silence: a stored tensor that plays no role, one that is missing, one of another shape and experts that disagree in number are
complaints, and all of them are found before the first one is raised.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from qwench.checkpoint.source import Part, TensorEntry, TensorSource
from qwench.errors import CheckpointError
from qwench.models import tables
from qwench.models.claims import Claim, fits, misfits, summary, unclaimed
from qwench.models.geometry import Complaint, Geometry, LayerKind, read_geometry, text_config
from qwench.models.map import ModelMap, Slot
from qwench.models.sets import block_of
from qwench.models.vision import PREFIX as VISION

State = Literal["present", "missing", "incomplete", "none"]
"""Of the MTP head and of the tower. `missing`: the config announces it and nothing of it is stored. `none`: neither announced nor stored."""


@dataclass(frozen=True)
class Survey:
    """A checkpoint with whatever is wrong with it.

    Attributes:
        map: everything that is stored as expected.
        complaints: what is not.
        mtp, vision: whether the MTP head and the tower are there.
    """

    map: ModelMap
    complaints: tuple[Complaint, ...]
    mtp: State
    vision: State


@dataclass(frozen=True)
class Layer:
    """One decoder layer's claims; `stem` is what its tensors' names begin with."""

    index: int
    kind: LayerKind
    component: Literal["text", "mtp"]
    stem: str
    claims: tuple[Claim, ...]

    def about_experts(self, name: str) -> bool:
        """Whether a tensor of this layer has one entry for each routed expert."""
        return name.startswith(f"{self.stem}mlp.experts.") or name == f"{self.stem}mlp.gate.weight"


@dataclass(frozen=True)
class Network:
    """All claims of a checkpoint: those of its layers, and by component those outside of them."""

    layers: tuple[Layer, ...]
    outside: dict[str, tuple[Claim, ...]]

    def claims(self) -> Iterator[Claim]:
        """In reading order: text, MTP, vision."""
        for component in ("text", "mtp", "vision"):
            yield from self.of(component)

    def of(self, component: str) -> Iterator[Claim]:
        yield from self.outside[component]
        for layer in self.layers:
            if layer.component == component:
                yield from layer.claims


def survey(source: TensorSource) -> Survey:
    """Map what is there and complain about the rest. Raises CheckpointError only where the config itself cannot be read."""
    g, names = read_geometry(source.config), source.tensors.keys()
    stored_mtp = any(n.startswith(tables.MTP) for n in names)
    network = _network(g, source.config, names, mtp=stored_mtp)
    odd = [(layer, counts) for layer in network.layers if g.moe and (counts := _disagreement(g, layer, source))]

    def counted(name: str) -> bool:
        return any(layer.about_experts(name) for layer, _ in odd)

    complaints = list(_expert_complaints(odd))
    for component in network.outside:
        complaints += misfits((c for c in network.of(component) if not counted(c.tensor)), source, component)
    complaints += unclaimed([c.tensor for c in network.claims()] + [n for n in names if counted(n)], source)
    mtp = _state(network.of("mtp"), source, announced=g.mtp_layers > 0)
    vision = _state(network.of("vision"), source, announced="vision_config" in source.config)
    return Survey(_map(g, network, source), tuple(complaints), mtp, vision)


def claims_of(component: str, config: Mapping[str, Any], names: Collection[str]) -> tuple[Claim, ...]:
    """What a checkpoint of this config that stores these names should hold of a component (`text`, `mtp`, `vision`), whether or not it announces it."""
    network = _network(read_geometry(config), config, {*names, VISION}, mtp=True)
    return tuple(network.of(component))


def _state(claims: Iterable[Claim], source: TensorSource, *, announced: bool) -> State:
    expected = list(claims)
    if not expected:
        return "missing" if announced else "none"
    return "present" if all(fits(c, source) for c in expected) else "incomplete"


def _network(g: Geometry, config: Mapping[str, Any], names: Collection[str], *, mtp: bool) -> Network:
    """What a checkpoint that stores these names should hold in all."""
    prefix, layout = tables.prefix_of(names), tables.expert_layout_of(names)
    layers: list[tuple[Literal["text", "mtp"], int, LayerKind, str, str]]
    layers = [("text", i, kind, f"{prefix}layers.{i}.", "") for i, kind in enumerate(g.kinds)]
    if mtp:
        layers += [("mtp", i, "full_attention", f"mtp.layers.{i}.", tables.MTP) for i in range(max(1, g.mtp_layers))]
    return Network(
        tuple(
            Layer(i, kind, component, stem, tuple(tables.layer_claims(g, kind, stem, tag, i, layout)))
            for component, i, kind, stem, tag in layers
        ),
        {
            "text": tuple(tables.trunk_claims(g, prefix, head=not g.tied or "lm_head.weight" in names)),
            "mtp": tuple(tables.mtp_claims(g)) if mtp else (),
            "vision": tables.tower_claims(config) if any(n.startswith(VISION) for n in names) else (),
        },
    )


def _map(g: Geometry, network: Network, source: TensorSource) -> ModelMap:
    def slots(claims: Iterable[Claim]) -> Iterator[Slot]:
        for claim in claims:
            if fits(claim, source):
                yield from claim.slots

    blocks = [block_of(layer.index, layer.kind, layer.component, tuple(slots(layer.claims))) for layer in network.layers]
    return ModelMap(
        model_type="qwen3_5_moe" if g.moe else "qwen3_5",
        prefix=tables.prefix_of(source.tensors.keys()),
        blocks=tuple(b for b in blocks if b.component == "text"),
        mtp=tuple(b for b in blocks if b.component == "mtp"),
        others=tuple(slot for component in network.outside for slot in slots(network.outside[component])),
        tied=g.tied,
    )


def _disagreement(g: Geometry, layer: Layer, source: TensorSource) -> str:
    """How the numbers of experts in a layer differ, in words; nothing where they agree."""
    stem = f"{layer.stem}mlp."
    counts = {"config.json": g.experts}
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        if entry := source.tensors.get(stem + name):
            counts[f"mlp.{name}"] = entry.shape[0] if entry.shape else 0
    singles = {n.removeprefix(f"{stem}experts.").partition(".")[0] for n in source.tensors if n.startswith(f"{stem}experts.")}
    if single := sum(s.isdigit() for s in singles):
        counts["experts stored one by one"] = single
    return ", ".join(f"{where} {count}" for where, count in counts.items()) if len(set(counts.values())) > 1 else ""


def _expert_complaints(odd: Iterable[tuple[Layer, str]]) -> Iterator[Complaint]:
    alike: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for layer, counts in odd:
        alike[layer.component, counts].append(layer.stem.removesuffix("."))
    for (component, counts), stems in alike.items():
        mend = "use the config.json that belongs to these weights"
        if component == "mtp":
            mend += "; an MTP layer has as many experts as the trunk, engines load no other"
        yield f"{summary(stems)}: the numbers of experts disagree: {counts}", mend


class Sketch:
    """A checkpoint without weights: the tensors that a config describes, in the published layout."""

    def __init__(self, config: dict[str, Any], entries: Iterable[TensorEntry]) -> None:
        self.folder = Path(str(config.get("_name_or_path") or "config.json"))
        self.config = config
        self.tensors: Mapping[str, TensorEntry] = {e.name: e for e in entries}
        self.notes: Sequence[str] = ()

    def read(self, name: str, part: Part = ()) -> Tensor:
        """Always raises CheckpointError."""
        raise self._weightless(name)

    def chunks(self, name: str, part: Part = ()) -> Iterator[memoryview]:
        """Always raises CheckpointError."""
        raise self._weightless(name)

    def stamp(self) -> str:
        """A digest of the config."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    def _weightless(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{name} cannot be read: there is only a config here, no weights", "give the folder of the checkpoint"
        )


DTYPES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}


def sketch(config: dict[str, Any]) -> Sketch:
    """The published checkpoint of a config: experts fused in the trunk and single in MTP, MTP where `mtp_num_hidden_layers` announces it, a tower
    where there is a `vision_config`, everything in the config's dtype. Raises CheckpointError where the config is not whole."""
    g, text = read_geometry(config), text_config(config)
    stored = {tables.CONDITIONAL} if "text_config" in config else set()
    network = _network(g, config, {*stored, VISION}, mtp=g.mtp_layers > 0)
    dtype = DTYPES.get(str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype")), "BF16")
    return Sketch(config, (TensorEntry(c.tensor, dtype, c.shape) for c in network.claims()))
