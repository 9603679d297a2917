"""Low-rank corrections (EoRA) as a PEFT adapter beside a release: a LoRA that GPTQModel adds to what it decodes and that vLLM serves.

A folder of two files:

- `adapter_model.safetensors`: for each corrected module M (its name in the checkpoint, fused sets member by member) `base_model.model.M.lora_A.weight`
  [r, in] and `base_model.model.M.lora_B.weight` [out, r]. The output of M becomes W x + B (A x): alpha is r, so that nothing is scaled.
- `adapter_config.json`: PEFT's LoraConfig. Modules that are too small for the rank have less of it; `rank_pattern` and `alpha_pattern` say so
  together, since PEFT and vLLM scale by alpha / rank (GPTQModel never scales).

It must not lie among the release's own files, so it has a folder below them: transformers takes an `adapter_config.json` there for the model, and vLLM reads every `.safetensors` that
it finds. GPTQModel wants a correction for every quantized module, and must be told the rank that `r` says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.folder import some, take_inventory
from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import Part, TensorEntry, TensorSource, TensorSpec
from qwench.errors import CheckpointError
from qwench.formats.gptq import PREFIXES
from qwench.formats.matching import patterns

FOLDER = "eora"
"""The folder inside of a release where its corrections lie."""
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
RIGHT, LEFT = ".lora_A.weight", ".lora_B.weight"
UNREAD = ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "fan_in_fan_out")
"""Settings of PEFT that make a LoRA something else."""


def rank_of(shape: tuple[int, ...], rank: int) -> int:
    """The rank of the correction of a weight (out, in) where `rank` was asked for: no more than the weight can have."""
    return min(rank, *shape)


def layout(shapes: Mapping[str, tuple[int, ...]], rank: int, dtype: str = "BF16") -> list[TensorSpec]:
    """The tensors of `adapter_model.safetensors`.

    Args:
        shapes: module -> (out, in) of every weight that gets a correction.
        rank: that was asked for.
        dtype: safetensors code that the factors are stored in.
    """
    specs: list[TensorSpec] = []
    for module, shape in shapes.items():
        r = rank_of(shape, rank)
        specs.append(TensorSpec(PREFIX + module + RIGHT, dtype, (r, shape[1])))
        specs.append(TensorSpec(PREFIX + module + LEFT, dtype, (shape[0], r)))
    return specs


def pack(module: str, factors: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The tensors of one correction by name; `factors` are A [r, in] and B [out, r], as `Quantized.low_rank` has them."""
    right_RI, left_OR = factors
    assert right_RI.shape[0] == left_OR.shape[1], f"{module}: factors {list(right_RI.shape)} and {list(left_OR.shape)}"
    return {PREFIX + module + RIGHT: right_RI, PREFIX + module + LEFT: left_OR}


def adapter_config(shapes: Mapping[str, tuple[int, ...]], rank: int, base: str) -> dict[str, Any]:
    """What `adapter_config.json` says; `base` is the name or path of the release that the corrections are for. Other arguments as in `layout`."""
    ranks = _rank_pattern(shapes, rank)
    return {
        "alpha_pattern": ranks,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
        "task_type": "CAUSAL_LM",
    }


def _rank_pattern(shapes: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, int]:
    """Pattern -> rank of the modules with another rank than was asked for. Readers match from the beginning of a name to its end."""
    by_rank: dict[int, list[str]] = {}
    for module, shape in shapes.items():
        by_rank.setdefault(rank_of(shape, rank), []).append(module)
    return {
        line.removeprefix("re:"): found
        for found, modules in by_rank.items()
        if found != rank
        for line in patterns(modules, [m for m in shapes if m not in set(modules)], scopes=PREFIXES)
    }


class Adapter:
    """The corrections in a folder, ours or any plain LoRA, read one at a time.

    Attributes:
        folder: where it lies.
        config: the parsed `adapter_config.json`.
        modules: what has a correction.

    Raises:
        CheckpointError: a file is missing or damaged, half a correction, factors that do not fit, or something that is no plain LoRA.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, _read_config(folder / CONFIG_NAME)
        self._stored = Checkpoint(folder, self.config, take_inventory(folder))
        names = self._stored.tensors.keys()
        self.modules = tuple(sorted(n[len(PREFIX) : -len(RIGHT)] for n in names if n.startswith(PREFIX) and n.endswith(RIGHT)))
        strays = names - {PREFIX + module + side for module in self.modules for side in (LEFT, RIGHT)}
        if strays:
            raise CheckpointError(
                f"{folder} holds {some(strays)}, which make no correction", "give the folder of a LoRA adapter"
            )
        for module in self.modules:
            self._check(module)

    def _check(self, module: str) -> None:
        """Raises CheckpointError where the two factors are not there or do not fit."""
        left, right = (self._stored.tensors.get(PREFIX + module + side) for side in (LEFT, RIGHT))
        shapes = [list(found.shape) if found else None for found in (left, right)]
        if not left or not right or len(left.shape) != 2 or len(right.shape) != 2 or left.shape[1] != right.shape[0]:
            what = f"{self.folder}: {module} has lora_B {shapes[0]} and lora_A {shapes[1]}, which do not fit"
            raise CheckpointError(what, "the adapter is not whole: fetch it again")

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of the weight that a correction is for."""
        tensors = self._stored.tensors
        return tensors[PREFIX + module + LEFT].shape[0], tensors[PREFIX + module + RIGHT].shape[1]

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], float32; the adapter's scaling is in B."""
        right_RI = self._stored.read(PREFIX + module + RIGHT).to(torch.float32)
        left_OR = self._stored.read(PREFIX + module + LEFT).to(torch.float32)
        return right_RI, left_OR * self._scaling(module)

    def _scaling(self, module: str) -> float:
        rank = _of_pattern(self.config.get("rank_pattern"), module, self.config["r"])
        alpha = _of_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _of_pattern(pattern: Mapping[str, float] | None, module: str, otherwise: float) -> float:
    """The first entry that a module's name ends in, at a dot: PEFT's rule, and vLLM's."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def _read_config(path: Path) -> dict[str, Any]:
    mend = "give the folder of a LoRA adapter as PEFT saves it"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", mend) from None
    for key in ("r", "lora_alpha"):
        value = config.get(key) if isinstance(config, dict) else None
        if not isinstance(value, (int, float)) or value <= 0:
            raise CheckpointError(f"{path}: {key} is {value}", mend)
    if config.get("bias", "none") != "none" or any(config.get(key) for key in UNREAD):
        odd = [key for key in ("bias", *UNREAD) if config.get(key) not in (None, False, "none")]
        raise CheckpointError(f"{path} is more than a LoRA: {', '.join(odd)}", "Qwench reads plain LoRA adapters")
    return config


class Corrected:
    """A source whose corrected weights are W + B A; see `TensorSource`. What runs a model runs it with its corrections.

    Raises:
        CheckpointError: the adapter corrects what the source does not hold, or another shape of it.
    """

    def __init__(self, source: TensorSource, adapter: Adapter) -> None:
        self.source, self.adapter = source, adapter
        self.tensors: Mapping[str, TensorEntry] = source.tensors
        self._modules: Collection[str] = frozenset(adapter.modules)
        for module in adapter.modules:
            entry = source.tensors.get(f"{module}.weight")
            if entry is None or entry.shape != adapter.shape(module):
                what = f"{adapter.folder} corrects {module} {list(adapter.shape(module))}, {source.folder} has {entry and list(entry.shape)}"
                raise CheckpointError(what, "use the adapter that was made for this release")

    @property
    def folder(self) -> Path:
        return self.source.folder

    @property
    def config(self) -> dict[str, Any]:
        return self.source.config

    def read(self, name: str, part: Part = ()) -> Tensor:
        """One tensor or a part of it: float32 if it is corrected, else as the source has it. Raises as the source does."""
        values = self.source.read(name, part)
        module = name.removesuffix(".weight")
        if module not in self._modules or not name.endswith(".weight"):
            return values
        right_RI, left_OR = self.adapter.factors(module)
        rows = left_OR[part[0]] if part else left_OR
        columns = right_RI[:, part[1]] if len(part) > 1 else right_RI
        return values.to(torch.float32) + rows @ columns
