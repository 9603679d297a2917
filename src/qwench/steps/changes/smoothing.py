"""AWQ in a walk: for each fold of a layer, capture what its readers read, search scales, and move them.

The judge is the output of the whole module that reads: the MLP or mixture-of-experts block for `norm.post`, the mixer for `norm.input`, the down projection for an
up projection. Every reader of a norm is compensated, those that are not quantized too (router, shared expert's gate, decay projections).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qwench.checkpoint.source import TORCH_DTYPE, TensorSource
from qwench.methods.awq import Reader, SearchOptions, search_scales
from qwench.methods.clipping import clipped, group_moments, search_limits
from qwench.methods.folding import fold_norm, scale_columns, scale_rows, storable
from qwench.models.map import Fold, Slot
from qwench.models.modules import quiet, text_positions
from qwench.numerics import Scheme
from qwench.recipe import Smooth, layer_range
from qwench.stream.live import LiveBlock
from qwench.stream.observe import taking_inputs
from qwench.stream.walk import Rows

SEARCH_TOKENS = 16_384
"""Tokens that a search looks at; the module's outputs for them are held in memory."""

NOT_CLIPPED = ("attention.q", "attention.k", "delta.qkv")
"""Roles whose outputs are multiplied with each other before anything judges them."""


@dataclass
class Smoothing:
    """Attributes:
    settings: the recipe's step.
    schemes: module -> scheme of every weight that will be quantized.
    source: for the dtypes that norms are stored in.
    reports: what each search said, by `layer N fold`.
    """

    settings: Smooth
    schemes: Mapping[str, Scheme]
    source: TensorSource
    reports: dict[str, str] = field(default_factory=dict)
    name = "awq"
    needs_original = False

    def __call__(self, live: LiveBlock, rows: Rows) -> None:
        first, last = layer_range(self.settings.layers)
        if live.block.index < first or (last is not None and live.block.index > last):
            return
        for fold in live.block.folds:
            for source in self._sources(live, fold):
                self._smooth(live, rows, fold, source)

    def _sources(self, live: LiveBlock, fold: Fold) -> list[Slot]:
        """The slots whose channels a fold scales: one norm, or each expert's up projection."""
        if fold.source not in self.settings.folds:
            return []
        return [s for s in live.block.slots if s.role == fold.source]

    def _smooth(self, live: LiveBlock, rows: Rows, fold: Fold, source: Slot) -> None:
        readers = [
            s for s in live.block.slots if s.role in fold.readers and (source.expert is None or s.expert == source.expert)
        ]
        if not any(s.module in self.schemes for s in readers):
            return
        inputs = capture(live, rows, source, readers)
        key = f"layer {live.block.index} {fold.source}" + ("" if source.expert is None else f" expert {source.expert}")
        if not inputs:
            self.reports[key] = "no token reached it: 1 is kept"
            return
        weight, dtype = live.weight(source).clone(), TORCH_DTYPE[self.source.tensors[source.tensor].dtype]
        is_norm = source.role.startswith("norm.")

        def snap(scales: Tensor) -> Tensor:
            return storable(weight, scales, fold.zero_centred, dtype)

        found = search_scales(
            [Reader(live.weight(s), self.schemes.get(s.module), fused_name(live, s)) for s in readers],
            inputs,
            output_of(live, source, readers),
            SearchOptions(self.settings.grid, self.settings.duo),
            snap if is_norm else None,
        )
        self.reports[key] = found.says
        if not found.kept_one:
            moved = fold_norm(weight, found.scales, fold.zero_centred) if is_norm else scale_rows(weight, found.scales)
            live.alter(source, moved)
            for slot in readers:
                live.alter(slot, scale_columns(live.weight(slot), found.scales))
        if self.settings.clip:
            self._clip(live, key, readers, inputs, found.scales)

    def _clip(self, live: LiveBlock, key: str, readers: list[Slot], inputs: list[Tensor], scales: Tensor) -> None:
        """Narrow the groups of the readers that will be rounded, where that makes their own output better. In attention, keys and queries meet in a
        product that rounding alone judges badly: they are left (AWQ's own rule)."""
        chosen = [s for s in readers if s.module in self.schemes and s.role not in NOT_CLIPPED]
        for slot in chosen:
            scheme = self.schemes[slot.module]
            moments = group_moments(inputs, scheme.group, scales)
            found = search_limits(live.weight(slot), scheme, moments)
            live.alter(slot, clipped(live.weight(slot), found.limits))
            self.reports[f"{key} clip {slot.role}"] = (
                f"{found.clipped_share:.1%} of the groups narrowed: loss {found.after / max(found.before, 1e-30):.3f}"
            )


def fused_name(live: LiveBlock, slot: Slot) -> str:
    """The set that engines fuse a weight into, or nothing."""
    return next((name for name, members in live.block.fused.items() if name != "experts" and slot in members), "")


@torch.no_grad()
def capture(live: LiveBlock, rows: Rows, source: Slot, readers: list[Slot]) -> list[Tensor]:
    """What the readers read, a batch at a time: [B, T, D] before a mixer or an MLP, [N, I] before a down projection."""
    taken: list[Tensor] = []
    tokens = 0

    def take(value: Tensor) -> None:
        if value.numel():
            taken.append(value.detach().clone())

    with _taking(live, source, readers, take):
        for batch in rows.batches():
            live.run(batch)
            tokens += batch.shape[0] * batch.shape[1]
            if tokens >= SEARCH_TOKENS:
                break
    return taken


def _taking(live: LiveBlock, source: Slot, readers: list[Slot], take: Callable[[Tensor], None]) -> AbstractContextManager[None]:
    if not source.role.startswith("norm."):
        name = next(name for name, slots in live.block.inputs.items() if readers[0] in slots)
        return taking_inputs(live, {name: take})
    return _taking_module(live.layer.get_submodule(module_name(live, source)), take)


@contextmanager
def _taking_module(module: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    def before(_module: object, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        take(positional[0] if positional else named["hidden_states"])

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def module_name(live: LiveBlock, norm: Slot) -> str:
    """The submodule of the transformers layer that reads a norm."""
    if norm.role == "norm.post":
        return "mlp"
    return "self_attn" if live.block.kind == "full_attention" else "linear_attn"


def output_of(live: LiveBlock, source: Slot, readers: list[Slot]) -> Callable[[list[Tensor], Tensor], Tensor]:
    """The module that reads the channels, as a function of its readers' weights."""
    if not source.role.startswith("norm."):
        return lambda weights, inputs: F.linear(inputs, weights[0])
    stem = module_name(live, source) + "."
    module = live.layer.get_submodule(stem[:-1])
    own = {name.removeprefix(stem): weight for name, weight in live.weights.items() if name.startswith(stem)}

    @torch.no_grad()
    def output(weights: list[Tensor], inputs: Tensor) -> Tensor:
        used = dict(own)
        for slot, weight in zip(readers, weights, strict=True):
            name, part = live.parameter(slot)
            name = name.removeprefix(stem)
            if not part:
                used[name] = weight
                continue
            if used[name] is own[name]:
                used[name] = own[name].clone()
            used[name][part] = weight
        named: dict[str, Any] = {}
        if stem == "self_attn.":
            length = inputs.shape[1]
            rope = live.modules.rope(text_positions(length).expand(3, len(inputs), length), inputs)
            named = {"position_embeddings": rope, "attention_mask": None}
        with quiet():
            result: Tensor | tuple[Tensor, ...] = functional_call(module, used, (inputs,), named)
        return result[0] if isinstance(result, tuple) else result

    return output
