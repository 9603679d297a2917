"""A GGUF file under the names of the checkpoint that it was made from, decoded as it is read: what evaluation and verification run.

    source = GgufSource(Path("model-Q4_K_M.gguf"), config)
    Trunk(source, source.map)

A GGUF file has no config.json, so it comes from the checkpoint, or from beside the file. Names and layout are the published ones, whatever layout the file was made
from. Every transform is undone: what is left of it is the rounding of the file's types. Text and MTP head only; the tower's file is not read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from qwench.checkpoint.source import Part, TensorEntry
from qwench.errors import CheckpointError
from qwench.formats.gguf_tensors import Content, GgufTensor, gguf_tensors
from qwench.models import map_of, sketch
from qwench.models.map import ModelMap, Slot

MEND = "make the file again, or give the config.json that belongs to it"


class GgufSource:
    """See `TensorSource`.

    Attributes:
        folder: where the file lies.
        file: the file.
        config: the checkpoint's config, without tower, and without MTP head where the file has none.
        tensors: every tensor of the checkpoint, as float32.
        map: its map.
        types: how each tensor of the file is stored, by its name there.

    Args:
        content: what the file holds: `model` (with or without a head), or `mtp`: a draft file, of which only what it has is there to read.

    Raises:
        CheckpointError: it is no GGUF file, it is truncated, or it is of another network than the config.
    """

    def __init__(self, file: Path, config: Mapping[str, Any], content: Content = "model") -> None:
        self.file, self.folder = file, file.parent
        try:
            reader = gguf.GGUFReader(file)
        except (OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{file} cannot be read as GGUF: {error}", "make or fetch the file again") from None
        self._stored = {t.name: t for t in reader.tensors}
        self.types = {name: t.tensor_type.name for name, t in self._stored.items()}
        head = any(".nextn." in name for name in self._stored)
        self.config = _text_only(config, head)
        plan = sketch(self.config)
        self.map: ModelMap = map_of(plan)
        self._parts: dict[str, list[tuple[GgufTensor, int, Slot]]] = defaultdict(list)
        for tensor in gguf_tensors(self.config, self.map, content):
            self._check(tensor)
            for number, slot in enumerate(tensor.slots):
                self._parts[slot.tensor].append((tensor, number, slot))
        self.tensors: Mapping[str, TensorEntry] = {
            n: TensorEntry(n, "F32", e.shape, file.name) for n, e in plan.tensors.items() if n in self._parts
        }

    def read(self, name: str, part: Part = ()) -> Tensor:
        """One tensor of the checkpoint, or a part of it, float32. Raises CheckpointError where there is none of that name."""
        if name not in self._parts:
            raise CheckpointError(f"{self.file} holds nothing of {name}", MEND)
        parts = self._parts[name]
        if not parts[0][2].part:
            tensor, number, slot = parts[0]
            if part and isinstance(part[0], slice) and tensor.by_rows and len(slot.shape) == 2 and len(tensor.slots) == 1:
                some = self._decoded(tensor, number, part[0])
                return some[(slice(None), *part[1:])].clone()
            whole = self._decoded(tensor, number)
            return whole[part].clone() if part else whole
        return self._assembled(name, parts, part)

    def _assembled(self, name: str, parts: list[tuple[GgufTensor, int, Slot]], part: Part) -> Tensor:
        """Experts that the checkpoint keeps in one tensor, decoding only those that are asked for."""
        only = part[0] if part and isinstance(part[0], int) else None
        shape = self.tensors[name].shape
        whole = torch.empty(shape if only is None else shape[1:])
        for tensor, number, slot in parts:
            expert, *rows = slot.part
            if only is None or expert == only % shape[0]:
                whole[tuple(rows) if only is not None else slot.part] = self._decoded(tensor, number)
        rest = part if only is None else part[1:]
        return whole[rest].clone() if rest else whole

    def _decoded(self, tensor: GgufTensor, number: int, rows: slice = slice(None)) -> Tensor:
        """One of a tensor's weights, or some of its rows where its transforms allow that."""
        stored = self._stored[tensor.name]
        data = stored.data[number] if len(tensor.slots) > 1 else stored.data.reshape(*tensor.shape[:-1], -1)
        value = torch.from_numpy(gguf.dequantize(np.array(data[rows]), stored.tensor_type).astype(np.float32, copy=False))
        for transform in reversed(tensor.transforms):
            value = transform.undo(value)
        return value

    def _check(self, tensor: GgufTensor) -> None:
        """Whether the file holds a tensor of this shape; dimensions of 1 in front do not count, quantizers drop them."""
        stored = self._stored.get(tensor.name)
        if stored is None:
            raise CheckpointError(f"{self.file} lacks {tensor.name}, which the network of config.json has", MEND)
        have = tuple(int(n) for n in reversed(stored.shape))
        if have != tensor.shape and (math.prod(have) != math.prod(tensor.shape) or have[-1] != tensor.shape[-1]):
            raise CheckpointError(f"{self.file}: {tensor.name} is {list(have)}, config.json says {list(tensor.shape)}", MEND)


def _text_only(config: Mapping[str, Any], head: bool) -> dict[str, Any]:
    """The config of what the file holds."""
    kept = {key: value for key, value in config.items() if key not in ("vision_config", "quantization_config")}
    part = dict(kept.get("text_config", kept))
    if not head:
        part["mtp_num_hidden_layers"] = 0
    return {**kept, "text_config": part} if "text_config" in kept else part
