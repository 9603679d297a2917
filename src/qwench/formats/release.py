"""A release read as if it had never been quantized.

`Release` wraps a checkpoint whose `config.json` has a `quantization_config` and shows its tensors under the names of the unquantized original:
`X.weight` for `X.weight_packed`, `X.weight_scale` and the rest, or for `X.qweight`, `X.scales` and theirs. What runs a model need not know the difference. Quantized weights are decoded
as they are read, to exact float32: which precision to compute in is the reader's choice. All other tensors come as they are stored. What is to be done to the inputs of a layer is
not in its weights: whoever runs the model asks `input_rounding` (see `models.inputs`).

Experts that are quantized are stored one by one, so they appear one by one, whatever the layout of the original was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import Part, TensorEntry, TensorSource
from qwench.errors import CheckpointError
from qwench.formats import FORMATS, Container
from qwench.formats.adapter import CONFIG_NAME, FOLDER, Adapter, Corrected
from qwench.formats.compressed_tensors import INPUT_SCALES, fits
from qwench.numerics import InputRounding, Quantized, Scheme, decode

ACTIVATION_SUFFIXES = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
"""Tensors of quantized activations: they do not change the weights, and are not shown. `input_rounding` reads those that it knows."""

OPTIONAL = (".weight_shape", ".g_idx")
"""Tensors that other writers leave out where they say nothing; `unpack` misses the second where it does."""


@dataclass(frozen=True)
class Stored:
    """A quantized weight as it lies in the file: its module, its scheme, (out, in)."""

    module: str
    scheme: Scheme
    shape: tuple[int, int]


def open_source(folder: Path, corrected: bool = True) -> TensorSource:
    """The tensors of a folder, decoded where its `config.json` says that they are quantized.

    Args:
        corrected: add the low-rank corrections that lie with it, if any (see `adapter`); engines that know nothing of them read the folder without.

    Raises:
        CheckpointError: everything that is wrong with the folder, and formats that we cannot read.
    """
    checkpoint = Checkpoint.open(folder)
    source: TensorSource = Release(checkpoint) if checkpoint.config.get("quantization_config") else checkpoint
    return Corrected(source, Adapter(folder / FOLDER)) if corrected and has_corrections(folder) else source


def has_corrections(folder: Path) -> bool:
    """Whether low-rank corrections lie with a release."""
    return (folder / FOLDER / CONFIG_NAME).is_file()


def container_of(config: Mapping[str, Any]) -> Container:
    """The container that a quantization_config, ours or anybody's, speaks of. Raises CheckpointError where it is none of ours."""
    method = config.get("quant_method", "compressed-tensors")
    if method not in FORMATS:
        raise CheckpointError(
            f"the checkpoint is quantized with {method!r}", f"Qwench reads {', '.join(FORMATS)} and unquantized checkpoints"
        )
    return FORMATS[method]


class Release:
    """A quantized checkpoint as a source of unquantized tensors; see `TensorSource`.

    Attributes:
        source: the stored tensors.
        container: how they are stored.
        stored: what is quantized, by the name that it is shown under.
        tensors: what is shown. A quantized weight has the dtype of its scales (BF16 where those are no plain floats) and its logical shape; file
            and start are those of its codes.
    """

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.container = container = container_of(source.config["quantization_config"])
        self.stored: dict[str, Stored] = {}
        shown: dict[str, TensorEntry] = {}
        marks = {container.SCALES, *container.CODES} & set(container.SUFFIXES)
        modules = {module for module, _, suffix in (n.rpartition(".") for n in source.tensors) if suffix in marks}
        if not modules:
            what = f"config.json says that {source.folder} is quantized ({container.METHOD}), and it holds no {' or '.join(sorted(marks))}"
            raise CheckpointError(what, "config.json and files are not of one checkpoint: fetch both again")
        for name, entry in source.tensors.items():
            module, _, suffix = name.rpartition(".")
            if module in modules and suffix in container.CODES:
                shown[f"{module}.weight"] = self._show(module, entry)
            elif not (module in modules and suffix in (*container.SUFFIXES, *ACTIVATION_SUFFIXES)):
                shown[name] = entry
        if orphans := modules - {weight.module for weight in self.stored.values()}:
            what = f"{min(orphans)} has scales and no codes ({' or '.join(container.CODES)})"
            raise CheckpointError(what, "the file is not whole: fetch it again")
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
        step = self.container.row_step(weight.scheme)
        first, last = wanted.start // step * step, min(math.ceil(wanted.stop / step) * step, weight.shape[0])
        if not len(wanted):
            return torch.empty(0, weight.shape[1])[(slice(None), *part[1:])]
        values = decode(self._rows(weight, first, last))[wanted.start - first : wanted.stop - first]
        return values[(slice(None) if isinstance(part[0], slice) else 0, *part[1:])]

    def quantized(self, name: str) -> Quantized | None:
        """The codes and scales behind a tensor, or None where it is not quantized. Raises as `read`."""
        weight = self.stored.get(name)
        return self._rows(weight, 0, weight.shape[0]) if weight else None

    def input_rounding(self, module: str) -> InputRounding | None:
        """What is done to the input of a linear layer; None where nothing is. See `models.inputs.RoundsInputs`.

        Raises:
            CheckpointError: from the source; a divisor or scale that is no positive number.
        """
        weight = self.stored.get(f"{module}.weight")
        if weight is None or weight.scheme.activations == "none":
            return None
        activations, block = weight.scheme.activations, weight.scheme.block
        if activations not in INPUT_SCALES:
            return InputRounding("int8" if activations == "int8" else "fp8", group=block[1] if block else None)
        name = f"{module}.{INPUT_SCALES[activations]}"
        outer = float(self.source.read(name))
        if not (math.isfinite(outer) and outer > 0):
            file = self.folder / self.source.tensors[name].file
            raise CheckpointError(
                f"{name} in {file} is {outer}: inputs cannot be divided by it", "the file was not calibrated: make it again"
            )
        return InputRounding("nvfp4" if activations == "nvfp4" else "fp8", outer)

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
        scheme = self.container.scheme_of(self.config["quantization_config"], module)
        mend = "config.json and files contradict each other: fetch both again, or ask who made them"
        if scheme is None:
            raise CheckpointError(f"{codes.name} is quantized, config.json says that {module} is not", mend)
        scale = self.source.tensors.get(f"{module}.{self.container.SCALES}")
        if len(codes.shape) != 2 or scale is None or (len(scale.shape) != 2 and not scheme.tensor):
            raise CheckpointError(f"{module}: there is no matrix of scales beside {codes.name} {list(codes.shape)}", mend)
        weight = Stored(module, scheme, self.container.shape_of(module, scheme, self.source.tensors, self.source.read))
        for spec in self.container.layout(module, weight.shape, scheme):
            there = self.source.tensors.get(spec.name)
            if there is None and not spec.name.endswith(OPTIONAL):
                raise CheckpointError(f"{spec.name} is missing; {scheme.label} needs it", mend)
            if there is not None and not fits(there.shape, spec):
                what = f"{spec.name} has the shape {list(there.shape)}, {scheme.label} needs {list(spec.shape)}"
                raise CheckpointError(what, mend)
        name = f"{module}.weight"
        self.stored[name] = weight
        dtype = scale.dtype if scale.dtype in ("BF16", "F16", "F32") else "BF16"
        return TensorEntry(name, dtype, weight.shape, codes.file, codes.start)

    def _rows(self, weight: Stored, first: int, last: int) -> Quantized:
        """The quantized rows first..last; `first` is a multiple of the row step, `last` too unless it is the end."""
        tensors: dict[str, Tensor] = {}
        for spec in self.container.layout(weight.module, weight.shape, weight.scheme):
            part = self.container.part_of(spec.name.rpartition(".")[2], weight.scheme, first, last)
            if part is not None and spec.name in self.source.tensors:
                tensors[spec.name] = self.source.read(spec.name, part)
        rows = (last - first, weight.shape[1])
        return self.container.unpack(weight.module, tensors, weight.scheme, rows, self.config["quantization_config"])


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
