"""What the rest of the code asks of something that holds tensors: names, shapes, and parts of them on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

Part = tuple[int | slice, ...]
"""An index into the leading dimensions of a tensor: `(7, slice(512, 1024))`. The empty tuple is the whole tensor."""


BYTES_OF: dict[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Bytes per element by safetensors dtype code."""

TORCH_DTYPE: dict[str, torch.dtype] = {
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64, "F32": torch.float32, "I32": torch.int32, "U32": torch.uint32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "U16": torch.uint16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""What torch calls each safetensors dtype code."""

DTYPE_CODE: dict[torch.dtype, str] = {dtype: code for code, dtype in TORCH_DTYPE.items()}
"""The safetensors dtype code of each torch dtype that can be stored."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as it is or will be stored: its name, its safetensors dtype code (`BF16`, `F32`, `F8_E4M3`, `U8` ...), its dimensions."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES_OF[self.dtype]


@dataclass(frozen=True)
class TensorEntry(TensorSpec):
    """A stored tensor and where it lies.

    Attributes:
        file: the file that holds it, relative to the folder ("" where there is none, as in a plan from a config alone).
        start: offset of its first byte in that file.
    """

    file: str = ""
    start: int = 0


class TensorSource(Protocol):
    """A checkpoint as its readers see it: stored tensors, or a release whose tensors are decoded as they are read.

    Attributes:
        folder: where it lies.
        config: the parsed `config.json`.
        tensors: every tensor by name.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, TensorEntry]: ...

    def read(self, name: str, part: Part = ()) -> Tensor:
        """One tensor, or a part of it; only that part is moved. Raises CheckpointError where the file does not hold it."""
        ...


class StoredSource(TensorSource, Protocol):
    """A source whose stored bytes can be passed on: a checkpoint, or a view of one (see `views`).

    Attributes:
        notes: what is odd about it, but no reason to stop; one sentence each.
    """

    @property
    def notes(self) -> Sequence[str]: ...

    def chunks(self, name: str, part: Part = ()) -> Iterator[memoryview]:
        """The stored bytes of a tensor or a part, not interpreted. Each chunk is valid until the next is asked for. Raises CheckpointError."""
        ...

    def stamp(self) -> str:
        """A digest that differs once somebody has written over the files."""
        ...
