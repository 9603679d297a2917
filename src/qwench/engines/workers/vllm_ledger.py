"""What vLLM's own loader does with each stored tensor, watched from outside. Runs inside of the engine's environment: no import of ours.

vLLM joins tensors while it loads (q, k and v into one parameter, all experts into two), renames them on the way, and skips in silence what it does not know.
Its own bookkeeping differs by model class and is switched off for quantized checkpoints. So we watch the only thing that cannot lie, the memory:

- Before loading, every parameter is filled with noise from a seed. Bytes that still hold the noise afterwards were never written: uninitialized.
- While loading, each operation that writes into the memory of a parameter counts for the stored tensor that the loader was given last (it pulls
  them one by one). A tensor that was handed over and wrote nothing was dropped: not consumed.

Trunk and MTP head are two models to vLLM, each loaded from the same files; a tensor is consumed where either took it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DEFAULTS = (
    *(
        f"attn.{part}"
        for part in ("q_scale", "k_scale", "v_scale", "prob_scale", "q_zero_point", "k_zero_point", "v_zero_point")
    ),
    "experts.w13_bias",
    "experts.w2_bias",
)
"""Parameters that a checkpoint may lack: those of a quantized KV cache and the biases that GPTQ experts are given have values from the start."""

KEPT = 1 << 16
"""Parameters of at most so many bytes get their first value back where no tensor reached them."""

READ_BACK = "_input_scale"
"""End of the names of parameters that a loader reads before it writes: experts' input scales, of which gate and up have one. Their noise is no number, which no comparison minds."""
QUIET = 0x7FC00000
"""Bits that make any float32 no number; what the others are is free."""

WINDOW = 16
"""Bytes that are looked at together: 16 bytes equal noise by chance once in 3e38."""


@dataclass
class Load:
    """One model that vLLM loaded.

    Attributes:
        model: its class.
        given: stored tensors that its loader was handed.
        consumed: those that wrote to a parameter.
        uninitialized: parameters with memory that nothing wrote.
    """

    model: str
    given: list[str] = field(default_factory=list)
    consumed: set[str] = field(default_factory=set)
    uninitialized: list[str] = field(default_factory=list)


def noise_like(parameter: Tensor, seed: int, name: str = "") -> Tensor:
    """The bytes that a parameter of this name holds before loading, uint8 [bytes]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (parameter.numel() * parameter.element_size(),), dtype=torch.uint8, generator=generator)
    if name.endswith(READ_BACK) and parameter.dtype == torch.float32:
        noise = (noise.view(torch.int32) | QUIET).view(torch.uint8)
    return noise


def as_bytes(parameter: Tensor) -> Tensor:
    return parameter.data.contiguous().flatten().view(torch.uint8)


def untouched(parameter: Tensor, seed: int, name: str = "") -> bool:
    """Whether some of a parameter still holds its noise: any stretch of 16 bytes, any single number of 4 bytes or more in a small parameter."""
    same = as_bytes(parameter) == noise_like(parameter, seed, name)
    width = parameter.element_size() if parameter.element_size() >= 4 and parameter.numel() < 1 << 16 else WINDOW
    if same.numel() < width:
        return bool(same.all())
    whole = same[: same.numel() // width * width].view(-1, width).all(1)
    return bool(whole.any()) or bool(same[-width:].all())


class Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which stored tensor was current whenever memory of a parameter is written."""

    def __init__(self, parameters: list[Tensor], load: Load) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        spans = sorted((p.untyped_storage().data_ptr(), p.untyped_storage().nbytes()) for p in parameters)
        self._starts, self._sizes = [s for s, _ in spans], [n for _, n in spans]
        self._load = load

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable and self._load.given:
            written = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write]
            if any(isinstance(a, Tensor) and self._ours(a) for a in written):
                self._load.consumed.add(self._load.given[-1])
        return result

    def _ours(self, tensor: Tensor) -> bool:
        at = tensor.untyped_storage().data_ptr()
        i = bisect.bisect_right(self._starts, at) - 1
        return i >= 0 and at < self._starts[i] + max(self._sizes[i], 1)


class Ledger:
    """Every load of this process, in order."""

    def __init__(self) -> None:
        self.loads: list[Load] = []

    def install(self) -> Ledger:
        """Put ourselves between vLLM's loader and its models."""
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        ledger, load_weights, get_all_weights = self, DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights

        def watched_load(loader: Any, model: nn.Module, model_config: Any) -> None:
            ledger.watch(model, lambda: load_weights(loader, model, model_config))

        def watched_weights(loader: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in get_all_weights(loader, model_config, model):
                ledger.loads[-1].given.append(name)
                yield name, tensor

        DefaultModelLoader.load_weights = watched_load
        DefaultModelLoader.get_all_weights = watched_weights
        return self

    def watch(self, model: nn.Module, load: Any) -> None:
        """Fill, load, compare; also where loading raises."""
        record = Load(type(model).__name__)
        self.loads.append(record)
        parameters = dict(model.named_parameters())
        first = {n: p.data.clone() for n, p in parameters.items() if p.numel() * p.element_size() <= KEPT}
        for seed, (name, parameter) in enumerate(parameters.items()):
            parameter.data.copy_(noise_like(parameter, seed, name).view(parameter.dtype).view(parameter.shape))
        try:
            with Writes([p.data for p in parameters.values()], record):
                load()
        finally:
            self._compare(parameters, first, record)

    def _compare(self, parameters: dict[str, nn.Parameter], first: dict[str, Tensor], record: Load) -> None:
        for seed, (name, parameter) in enumerate(parameters.items()):
            if parameter.numel() and untouched(parameter, seed, name):
                if name in first:
                    parameter.data.copy_(first[name])
                if not name.endswith(DEFAULTS):
                    record.uninitialized.append(name)

    @property
    def consumed(self) -> list[str]:
        return sorted(set().union(*(load.consumed for load in self.loads)))

    @property
    def uninitialized(self) -> list[str]:
        return [f"{load.model}: {name}" for load in self.loads for name in load.uninitialized]
