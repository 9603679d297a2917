"""What engines do to the inputs of linear layers, done to the layers of transformers while we run them.

A release in W4A4 or W8A8 says of a linear layer not only what its weights are, but that its input is to be rounded (see `numerics.activation`). A source that knows of such layers is a
`RoundsInputs`; all others leave inputs as they are.

Layers that are modules get a hook in front of them. Experts are one module for all, which multiplies inside: there the same sum is computed here, expert by expert, with what
gate and up read rounded before the first product and what down reads before the second.

Letters in names: N tokens, D hidden size, K experts that a token is sent to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwench.checkpoint.source import TensorSource
from qwench.models.map import Slot
from qwench.numerics import InputRounding

Rounded = Mapping[str, InputRounding]
"""By `Slot.module`: how the input of a linear layer is rounded."""
Undo = Callable[[], None]


@runtime_checkable
class RoundsInputs(Protocol):
    """A source that may say of linear layers that their input is rounded."""

    def input_rounding(self, module: str) -> InputRounding | None:
        """What is done to the input of a linear layer (see `Slot.module`), or None. Raises CheckpointError where the file does not hold it."""
        ...


def rounded_inputs(source: TensorSource, slots: Iterable[Slot]) -> dict[str, InputRounding]:
    """Which of these weights read a rounded input. Raises CheckpointError from the source."""
    if not isinstance(source, RoundsInputs):
        return {}
    found = {slot.module: source.input_rounding(slot.module) for slot in slots if slot.linear}
    return {module: rounding for module, rounding in found.items() if rounding is not None}


@contextmanager
def rounding_inputs(layer: nn.Module, slots: Iterable[Slot], stem: str, rounded: Rounded) -> Iterator[None]:
    """While it lasts, a decoder layer of transformers rounds what its linear layers read."""
    undo = round_inputs(layer, slots, stem, rounded)
    try:
        yield
    finally:
        undo()


def round_inputs(layer: nn.Module, slots: Iterable[Slot], stem: str, rounded: Rounded) -> Undo:
    """Make a decoder layer of transformers round what its linear layers read, until what is returned is called.

    Args:
        slots: the layer's weights; `mtp.fc` too where it stands in the layer under the name `fc`.
        stem: what the names of the layer's tensors begin with.
    """
    undone: list[Undo] = []
    experts: dict[tuple[str, int], InputRounding] = {}
    for slot in slots:
        if slot.module not in rounded:
            continue
        if slot.expert is not None:
            experts[slot.role.rpartition(".")[2], slot.expert] = rounded[slot.module]
            continue
        name = slot.tensor.removeprefix(stem).removeprefix("mtp.").rpartition(".")[0]
        undone.append(layer.get_submodule(name).register_forward_pre_hook(_hook(rounded[slot.module])).remove)
    if experts:
        undone.append(_replace_experts(layer.get_submodule("mlp.experts"), experts))

    def undo() -> None:
        for one in undone:
            one()

    return undo


def _hook(rounding: InputRounding) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _module, inputs: (rounding(inputs[0]), *inputs[1:])


def _replace_experts(experts: Any, rounded: Mapping[tuple[str, int], InputRounding]) -> Undo:
    """Give the module of all experts a forward pass that rounds; `rounded` by (gate, up or down; expert)."""

    def reads(half: str, expert: int, x: Tensor) -> Tensor:
        rounding = rounded.get((half, expert))
        return rounding(x) if rounding else x

    def forward(hidden_ND: Tensor, chosen_NK: Tensor, shares_NK: Tensor) -> Tensor:
        total_ND = torch.zeros_like(hidden_ND)
        for expert in torch.unique(chosen_NK).tolist():
            token, rank = torch.where(chosen_NK == expert)
            x, (gate, up) = hidden_ND[token], experts.gate_up_proj[expert].chunk(2)
            x_gate = reads("gate", expert, x)
            x_up = x_gate if rounded.get(("up", expert)) == rounded.get(("gate", expert)) else reads("up", expert, x)
            inner = experts.act_fn(F.linear(x_gate, gate)) * F.linear(x_up, up)
            out = F.linear(reads("down", expert, inner), experts.down_proj[expert]) * shares_NK[token, rank, None]
            total_ND.index_add_(0, token, out.to(total_ND.dtype))
        return total_ND

    experts.forward = forward
    return lambda: delattr(experts, "forward")
