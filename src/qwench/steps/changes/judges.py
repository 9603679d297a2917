"""What judges a smoothing scale: what the readers of a fold read, and the module that reads it as a function of their weights.

Letters in names: N tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qwench.methods.awq import Output
from qwench.models.expert_products import even, even_linear
from qwench.models.kernels import kernels_for
from qwench.models.map import Slot
from qwench.stream.live import LiveBlock
from qwench.stream.observe import taking_inputs
from qwench.stream.walk import Rows

SEARCH_TOKENS = 16_384
"""Tokens that a search looks at; the module's outputs for them are held in memory."""


@torch.no_grad()
def run_some(live: LiveBlock, rows: Rows) -> None:
    """Run the layer on about `SEARCH_TOKENS` tokens, for whoever listens."""
    tokens = 0
    for batch in rows.batches():
        live.run(batch)
        tokens += batch.shape[0] * batch.shape[1]
        if tokens >= SEARCH_TOKENS:
            return


Rope = tuple[Tensor, Tensor]
"""Cosines and sines of where the tokens of a batch stand."""


@dataclass(frozen=True)
class Read:
    """What a module reads.

    Attributes:
        inputs: [B, T, D] a batch.
        ropes: of attention, beside each batch; empty for what does not ask where tokens stand.
    """

    inputs: list[Tensor] = field(default_factory=list)
    ropes: list[Rope] = field(default_factory=list)

    def rope_of(self, batch: Tensor) -> Rope:
        """That of one of `inputs`, the very same tensor."""
        return next(rope for known, rope in zip(self.inputs, self.ropes, strict=True) if known is batch)


def capture_module(live: LiveBlock, rows: Rows, norm: Slot) -> Read:
    """What the module behind a norm reads."""
    taken = Read()

    def take(value: Tensor, rope: Rope | None) -> None:
        taken.inputs.append(value.detach().clone())
        taken.ropes.extend([rope] if rope else [])

    with _taking_module(live.layer.get_submodule(module_name(live, norm)), take):
        run_some(live, rows)
    return taken


def inputs_one_by_one(live: LiveBlock, rows: Rows, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """What each of some input sets reads, one after the other, [N, I] a batch; nothing where no token reached it.

    Down projections that are to see all tokens, not those of their expert alone, would hold experts times tokens between them: so what the mixture reads is held, and what one of them makes of it
    while it is its turn."""
    if rows.reach == "all" and all(name.startswith("experts.") for name in names):
        read = capture_inputs(live, rows, ["mlp"])["mlp"]
        for name in names:
            gate_up = live.weights["mlp.experts.gate_up_proj"][int(name.split(".")[1])]
            yield [_inner(x, gate_up) for x in read] if name.endswith(".down") else read
        return
    taken = capture_inputs(live, rows, names)
    for name in names:
        yield taken.pop(name)


def _inner(x_ND: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = F.linear(x_ND, gate_up).chunk(2, -1)
    return F.silu(gate) * up


def capture_inputs(live: LiveBlock, rows: Rows, names: Sequence[str]) -> dict[str, list[Tensor]]:
    """What linear modules read, by input set, [N, I] a batch; all experts in one pass, each with the tokens that are sent to it. Batches without tokens are left out."""
    taken: dict[str, list[Tensor]] = {name: [] for name in names}

    def taker(name: str) -> Callable[[Tensor], None]:
        return lambda value: taken[name].append(value.clone()) if value.numel() else None

    with taking_inputs(live, {name: taker(name) for name in names}):
        run_some(live, rows)
    return taken


def module_name(live: LiveBlock, norm: Slot) -> str:
    """The submodule of the transformers layer that reads a norm."""
    if norm.role == "norm.post":
        return "mlp"
    return "self_attn" if live.block.kind == "full_attention" else "linear_attn"


def is_mixture(readers: Sequence[Slot]) -> bool:
    """Whether a norm's readers are a mixture of experts."""
    return any(slot.role == "router" for slot in readers)


def module_output(live: LiveBlock, norm: Slot, readers: Sequence[Slot], read: Read) -> Output:
    """The module behind a norm, as a function of its readers' weights and of one of the batches that were read."""
    stem = module_name(live, norm) + "."
    module = live.layer.get_submodule(stem[:-1])
    own = {name.removeprefix(stem): weight for name, weight in live.weights.items() if name.startswith(stem)}
    places = [live.parameter(slot)[0].removeprefix(stem) for slot in readers]

    @torch.no_grad()
    def output(weights: Sequence[Tensor], inputs_BTD: Tensor) -> Tensor:
        named: dict[str, Any] = {}
        if stem == "self_attn.":
            named = {"position_embeddings": read.rope_of(inputs_BTD), "attention_mask": None}
        with kernels_for(inputs_BTD, quick=True):
            result: Tensor | tuple[Tensor, ...] = functional_call(
                module, own | dict(zip(places, weights, strict=True)), (inputs_BTD,), named
            )
        return result[0] if isinstance(result, tuple) else result

    return output


def mixture_output(live: LiveBlock, readers: Sequence[Slot]) -> Output:
    """A mixture of experts as a function of the weights that read its norm: all but the down projections. Each weight is asked for once, one expert after the
    other, so that those of all experts need not exist together."""
    module = live.layer.get_submodule("mlp")
    place = {(slot.role, slot.expert): index for index, slot in enumerate(readers)}
    router, downs = module.get_submodule("gate"), live.weights["mlp.experts.down_proj"]

    @torch.no_grad()
    def output(weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        def weight(role: str, expert: int | None = None) -> Tensor:
            return weights[place[role, expert]]

        tokens_ND = inputs.reshape(-1, inputs.shape[-1])
        with kernels_for(tokens_ND):
            _, shares, chosen = functional_call(router, {"weight": weight("router")}, (tokens_ND,))
        shared = gated(
            tokens_ND, weight("shared.gate"), weight("shared.up"), live.weights["mlp.shared_expert.down_proj.weight"]
        )
        total_ND = torch.sigmoid(F.linear(tokens_ND, weight("shared.router"))) * shared
        for expert, down in enumerate(downs):
            token, rank = torch.where(chosen == expert)
            if len(token):
                read = even(tokens_ND[token])
                out = gated(read, weight("expert.gate", expert), weight("expert.up", expert), down)[: len(token)]
                total_ND.index_add_(0, token, out * shares[token, rank, None])
        return total_ND.view(inputs.shape)

    return output


def gated(tokens: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A SwiGLU MLP."""
    return F.linear(F.silu(F.linear(tokens, gate)) * F.linear(tokens, up), down)


def linear_output(weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """A linear module that is the only reader."""
    return even_linear(inputs, weights[0])


@contextmanager
def _taking_module(module: nn.Module, take: Callable[[Tensor, Rope | None], None]) -> Iterator[None]:
    def before(_module: object, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        take(positional[0] if positional else named["hidden_states"], named.get("position_embeddings"))

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
