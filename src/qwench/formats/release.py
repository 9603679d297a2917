"""A release read as if it had never been quantized.

`Release` wraps a checkpoint whose `config.json` has a `quantization_config` and shows its tensors under the names of the unquantized original:
`X.weight` for `X.weight_packed`, `X.weight_scale` and the rest. What runs a model need not know the difference. Quantized weights are decoded
as they are read, to exact float32: which precision to compute in is the reader's choice. All other tensors come as they are stored.

Experts that are quantized are stored one by one, so they appear one by one, whatever the layout of the original was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import Part, TensorEntry, TensorSource
from qwench.errors import CheckpointError
from qwench.formats.compressed_tensors import SUFFIXES, layout, scheme_of, unpack
from qwench.numerics import Quantized, Scheme, decode

ACTIVATION_SUFFIXES = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
"""Tensors of quantized activations: they do not change the weights, and are not shown."""


@dataclass(frozen=True)
class Stored:
    """A quantized weight as it lies in the file: its module, its scheme, (out, in)."""

    module: str
    scheme: Scheme
    shape: tuple[int, int]

    @property
    def row_step(self) -> int:
        """Rows that can only be read together: those of a block, or of a word of zero points."""
        if self.scheme.block:
            return self.scheme.block[0]
        return 1 if self.scheme.symmetric else 32 // self.scheme.bits


def open_source(folder: Path) -> TensorSource:
    """The tensors of a folder, decoded where its `config.json` says that they are quantized.

    Raises:
        CheckpointError: everything that is wrong with the folder, and formats that we cannot read.
    """
    checkpoint = Checkpoint.open(folder)
    return Release(checkpoint) if checkpoint.config.get("quantization_config") else checkpoint


class Release:
    """A quantized checkpoint as a source of unquantized tensors; see `TensorSource`.

    Attributes:
        source: the stored tensors.
        stored: what is quantized, by the name that it is shown under.
        tensors: what is shown. A quantized weight has the dtype of its scales (BF16 where those are no plain floats) and its logical shape; file
            and start are those of its codes.
    """

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.stored: dict[str, Stored] = {}
        shown: dict[str, TensorEntry] = {}
        modules = {n.rpartition(".")[0] for n in source.tensors if n.endswith((".weight_scale", ".weight_packed"))}
        for name, entry in source.tensors.items():
            module, _, suffix = name.rpartition(".")
            if module in modules and suffix in ("weight_packed", "weight"):
                shown[f"{module}.weight"] = self._show(module, entry)
            elif not (module in modules and suffix in (*SUFFIXES, *ACTIVATION_SUFFIXES)):
                shown[name] = entry
        self.tensors: Mapping[str, TensorEntry] = shown

    @property
    def folder(self) -> Path:
        return self.source.folder

    @property
    def config(self) -> dict[str, Any]:
        return self.source.config

    def read(self, name: str, part: Part = ()) -> Tensor:
        """One tensor or a part of it: float32 if it is quantized, else as stored. Only the rows that the part needs are moved and decoded.

        Raises:
            CheckpointError: as `Checkpoint.read`; a stored tensor that is not what the config says.
            IndexError: the part does not fit the tensor's shape.
        """
        if name not in self.stored:
            return self.source.read(name, part)
        weight = self.stored[name]
        if not part:
            return decode(self._rows(weight, 0, weight.shape[0]))
        wanted = _row_range(part[0], weight.shape[0], name)
        step = weight.row_step
        first, last = wanted.start // step * step, min(math.ceil(wanted.stop / step) * step, weight.shape[0])
        if not len(wanted):
            return torch.empty(0, weight.shape[1])[(slice(None), *part[1:])]
        values = decode(self._rows(weight, first, last))[wanted.start - first : wanted.stop - first]
        return values[(slice(None) if isinstance(part[0], slice) else 0, *part[1:])]

    def quantized(self, name: str) -> Quantized | None:
        """The codes and scales behind a tensor, or None where it is not quantized. Raises as `read`."""
        weight = self.stored.get(name)
        return self._rows(weight, 0, weight.shape[0]) if weight else None

    def close(self) -> None:
        """Close what lies below."""
        close = getattr(self.source, "close", None)
        if close:
            close()

    def __enter__(self) -> Release:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _show(self, module: str, codes: TensorEntry) -> TensorEntry:
        """The entry that a quantized weight is shown as, noting what it is. Raises CheckpointError."""
        scheme = scheme_of(self.config["quantization_config"], module)
        mend = "config.json and files contradict each other: fetch both again, or ask who made them"
        if scheme is None:
            raise CheckpointError(f"{codes.name} is quantized, config.json says that {module} is not", mend)
        scale = self.source.tensors.get(f"{module}.weight_scale")
        if len(codes.shape) != 2 or scale is None or len(scale.shape) != 2:
            raise CheckpointError(f"{module}: there is no matrix of scales beside {codes.name} {list(codes.shape)}", mend)
        weight = Stored(module, scheme, (codes.shape[0], self._columns(module, scheme, codes, scale)))
        for spec in layout(module, weight.shape, scheme):
            there = self.source.tensors.get(spec.name)
            if there is None and not spec.name.endswith("weight_shape"):
                raise CheckpointError(f"{spec.name} is missing; {scheme.label} needs it", mend)
            if there is not None and there.shape != spec.shape:
                what = f"{spec.name} has the shape {list(there.shape)}, {scheme.label} needs {list(spec.shape)}"
                raise CheckpointError(what, mend)
        name = f"{module}.weight"
        self.stored[name] = weight
        dtype = scale.dtype if scale.dtype in ("BF16", "F16", "F32") else "BF16"
        return TensorEntry(name, dtype, weight.shape, codes.file, codes.start)

    def _columns(self, module: str, scheme: Scheme, codes: TensorEntry, scale: TensorEntry) -> int:
        """Logical columns. Only rows of integers without groups need the stored shape: their last word may be partly filled."""
        if scheme.kind == "fp8":
            return codes.shape[1]
        if scheme.group:
            return scale.shape[1] * scheme.group
        name = f"{module}.weight_shape"
        if name in self.source.tensors:
            return int(self.source.read(name)[1])
        return codes.shape[1] * 32 // scheme.bits

    def _rows(self, weight: Stored, first: int, last: int) -> Quantized:
        """The quantized rows first..last; `first` is a multiple of the row step, `last` too unless it is the end."""
        rows, columns = last - first, weight.shape[1]
        tensors: dict[str, Tensor] = {}
        specs = zip(_names(weight, weight.shape), layout(weight.module, (rows, columns), weight.scheme), strict=True)
        for whole, spec in specs:
            if spec.name.endswith("weight_shape"):
                continue
            # A tensor with fewer rows than the weight has them by block or by word.
            step = 1 if whole == weight.shape[0] else weight.row_step
            part: Part = () if spec.shape == (1,) else (slice(first // step, first // step + spec.shape[0]),)
            tensors[spec.name] = self.source.read(spec.name, part)
        return unpack(weight.module, tensors, weight.scheme, (rows, columns))


def _names(weight: Stored, shape: tuple[int, int]) -> Iterable[int]:
    """Rows of each tensor of the layout of a whole weight."""
    return [spec.shape[0] for spec in layout(weight.module, shape, weight.scheme)]


def _row_range(index: int | slice, rows: int, name: str) -> range:
    """The rows that an index keeps, with Python's meaning of negative and open ends."""
    if isinstance(index, slice):
        wanted = range(*index.indices(rows))
        if wanted.step != 1:
            raise ValueError(f"{name}: {index}: only steps of 1 are read")
        return wanted if len(wanted) else range(0)
    if not -rows <= index < rows:
        raise IndexError(f"{name}: row {index} of {rows}")
    return range(index % rows, index % rows + 1)
