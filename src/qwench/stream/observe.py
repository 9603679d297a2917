"""What the inputs of a layer's linear modules look like on the calibration rows.

Statistics are sums: they add up over rows, batches, devices and machines in any order, and mean what they mean only together with their count.

Letters in names: N tokens, I input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qwench.models.expert_products import even_linear
from qwench.models.map import Block
from qwench.stream.live import Batch, LiveBlock


@dataclass
class Moment:
    """Sums over the tokens that a set of modules read.

    Attributes:
        count: tokens.
        second: sum of x x^T, float32 [I, I]; None where only magnitudes were asked for.
        magnitude: sum of |x|, float32 [I].
    """

    count: int
    second: Tensor | None
    magnitude: Tensor

    def add(self, inputs_NI: Tensor) -> None:
        """Take in more tokens."""
        inputs_NI = inputs_NI.float()
        self.count += len(inputs_NI)
        self.magnitude += inputs_NI.abs().sum(0)
        if self.second is not None:
            self.second.addmm_(inputs_NI.T, inputs_NI)

    def __add__(self, other: Moment) -> Moment:
        second = self.second + other.second if self.second is not None and other.second is not None else None
        return Moment(self.count + other.count, second, self.magnitude + other.magnitude)


Take = Callable[[Tensor], None]
Hook = Callable[..., None]

Reach = Literal["routed", "all"]
"""Which tokens the statistics of an expert are gathered on: those that the router sends to it, or all. What the layer puts out follows the router whichever."""


@torch.no_grad()
def observe(
    live: LiveBlock, batches: Iterable[Batch | Tensor], names: Collection[str], second: bool = True
) -> dict[str, Moment]:
    """Run the rows through a layer and sum up what reaches its linear modules.

    Args:
        batches: hidden states before the layer, [B, T, D] each.
        names: input sets of the block (see `models.map.Block.inputs`).
        second: whether second moments are wanted; they take I x I floats for each set.
    """
    moments = {name: empty(live.block, name, second, live.device) for name in names}
    with taking_inputs(live, {name: moment.add for name, moment in moments.items()}, enough=True):
        for batch in batches:
            with suppress(Enough):
                live.run(batch)
    return moments


def empty(block: Block, name: str, second: bool, device: torch.device) -> Moment:
    """A moment of no tokens, summed up on a device."""
    width = block.inputs[name][0].shape[1]
    return Moment(0, torch.zeros(width, width, device=device) if second else None, torch.zeros(width, device=device))


class Enough(Exception):
    """All takers have been given what they read: the rest of the pass is not needed."""


@contextmanager
def taking_inputs(live: LiveBlock, takers: dict[str, Take], enough: bool = False, reach: Reach = "routed") -> Iterator[None]:
    """While it lasts, whatever an input set reads is also given to its taker, [N, I].

    Args:
        enough: stop each pass where the last taker has been given its part, with `Enough`.
        reach: which tokens the sets of experts are shown.
    """
    experts: dict[str, Take] = {}
    hooks = len({live.block.inputs[name][0].expert is not None or name for name in takers})
    counted = _counted(hooks) if enough else _as_it_is
    with ExitStack() as stack:
        for name, take in takers.items():
            slot = live.block.inputs[name][0]
            if slot.expert is not None:
                experts[name] = take
                continue
            handle = live.submodule(slot).register_forward_pre_hook(counted(_flat(take)))
            stack.callback(handle.remove)
        if experts:
            slot = next(s for s in live.block.slots if s.expert is not None)
            handle = live.submodule(slot).register_forward_pre_hook(counted(_of_experts(live, experts, reach)))
            stack.callback(handle.remove)
        yield


def _as_it_is(hook: Hook) -> Hook:
    return hook


def _counted(hooks: int) -> Callable[[Hook], Hook]:
    """Makes the last of so many hooks of a pass end it."""
    fired = 0

    def counted(hook: Hook) -> Hook:
        def counting(module: object, inputs: tuple[Tensor, ...]) -> None:
            nonlocal fired
            hook(module, inputs)
            fired = (fired + 1) % hooks
            if fired == 0:
                raise Enough

        return counting

    return counted


def _flat(take: Take) -> Callable[..., None]:
    def hook(_module: object, inputs: tuple[Tensor, ...]) -> None:
        take(inputs[0].detach().flatten(0, -2))

    return hook


def _of_experts(live: LiveBlock, takers: dict[str, Take], reach: Reach) -> Callable[..., None]:
    """Each expert reads the tokens that the router sends to it, or all; its down projection reads what gate and up make of them."""
    wanted = {int(name.split(".")[1]) for name in takers}

    def hook(_module: object, inputs: tuple[Tensor, ...]) -> None:
        hidden, chosen = inputs[0].detach(), inputs[1]
        for expert in wanted:
            tokens = hidden if reach == "all" else hidden[(chosen == expert).any(-1)]
            if take := takers.get(f"experts.{expert}"):
                take(tokens)
            if take := takers.get(f"experts.{expert}.down"):
                gate, up = even_linear(tokens, live.weights["mlp.experts.gate_up_proj"][expert]).chunk(2, -1)
                take(F.silu(gate) * up)

    return hook
