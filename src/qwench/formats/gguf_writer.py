"""Writing a GGUF file that appears whole or not at all, with one matrix of one expert in memory.

The header follows from the plan, so it goes first; tensors stream behind it, expert by expert, and a few thousand rows at a time where their transform allows. All
of it goes to a hidden file beside the target, which gets its name when everything is on the disk.
"""

from __future__ import annotations

import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from qwench.checkpoint.parts import part_shape
from qwench.checkpoint.source import BYTES_OF, Part, TensorSource
from qwench.checkpoint.staging import output_errors
from qwench.errors import CheckpointError, OutputError
from qwench.formats.gguf import ALIGNMENT, GgufPlan, PlannedTensor, fields_of, padded
from qwench.formats.gguf_fields import Field, add_field
from qwench.formats.gguf_importance import Importance
from qwench.formats.gguf_tensors import GgufTensor
from qwench.formats.gguf_types import tensor_bytes
from qwench.models.map import Slot
from qwench.numerics import largest_magnitude
from qwench.numerics.ggml import Encoder, encoder

ELEMENTS = 1 << 22
"""Values that are read and encoded at a time: 16 MiB as float32."""
LARGEST = float(torch.finfo(torch.float16).max)
"""Scales are float16 numbers in every quantized type, and no healthy weight is beyond them."""


@dataclass(frozen=True)
class Written:
    """A finished file: its bytes, and their CRC-32."""

    nbytes: int
    crc32: int


Progress = Callable[[int, str], None]
"""Called for every piece that is written, with its bytes and the name of its tensor."""


def write_gguf(
    plan: GgufPlan, source: TensorSource, path: Path, *, importance: Importance | None = None, encode: Encoder | None = None,
    progress: Progress | None = None,
) -> Written:  # fmt: skip
    """Write the file.

    Args:
        plan: what it holds.
        source: where the weights are.
        path: the file that is to appear; it does not exist yet.
        importance: how much each input channel of a tensor counts; only types with a choice of scales use it.
        encode: who rounds: llama.cpp's own quantizer where it is installed, else ours; the bytes are the same.
        progress: hears of every piece.

    Raises:
        OutputError: the path is taken, or the disk is full.
        CheckpointError: a weight cannot be read, or the folder lacks a file that the metadata is made from.
    """
    if path.exists():
        raise OutputError(f"{path} exists already", "choose another name, or remove that file")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", "make it first, or mend the path")
    if importance is not None:
        importance.check(plan)
    head = header(plan, fields_of(plan, source))
    beside = path.with_name(f".{path.name}.partial")
    with output_errors(beside, len(head) + plan.tensor_bytes):
        try:
            with beside.open("wb") as file:
                summed = _Summed(file)
                summed.write(head)
                for planned in plan.tensors:
                    _write_tensor(summed, planned, source, importance, encode or encoder(), progress)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(path)
        finally:
            beside.unlink(missing_ok=True)
    return Written(summed.nbytes, summed.crc32)


class _Summed:
    """A file that counts and sums what goes into it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.nbytes, self.crc32 = file, 0, 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.nbytes, self.crc32 = self.nbytes + len(data), zlib.crc32(data, self.crc32)


def header(plan: GgufPlan, fields: list[Field]) -> bytes:
    """The file up to its first tensor, padded, as the gguf library writes it."""
    library = gguf.GGUFWriter(None, plan.architecture)
    for field in fields:
        if field.key != "general.architecture":  # the library writes it itself
            add_field(library, field)
    for planned in plan.tensors:
        kind = gguf.GGMLQuantizationType[planned.type]
        library.add_tensor_info(planned.tensor.name, planned.tensor.shape, np.dtype(np.float32), planned.nbytes, raw_dtype=kind)
    with tempfile.TemporaryDirectory(prefix="qwench-gguf-") as folder:
        path = Path(folder) / "header"
        library.write_header_to_file(path)
        library.write_kv_data_to_file()
        library.write_ti_data_to_file()
        library.close()
        data = path.read_bytes()
    return data + bytes(padded(len(data)) - len(data))


def file_bytes(plan: GgufPlan, source: TensorSource) -> int:
    """Exactly how large the file will be. Raises CheckpointError where the folder lacks what the metadata is made from."""
    return len(header(plan, fields_of(plan, source))) + plan.tensor_bytes


def working_memory(plan: GgufPlan, source: TensorSource) -> int:
    """Bytes that writing takes at the worst: the largest piece as stored, as float32 before and after its transforms, and encoded."""
    return max((_piece_bytes(planned, source) for planned in plan.tensors), default=0)


def _piece_bytes(planned: PlannedTensor, source: TensorSource) -> int:
    """Of the largest piece of one tensor. A piece is whole where a transform moves rows."""
    tensor = planned.tensor
    count = max(math.prod(part_shape(source.tensors[s.tensor].shape, p)) for s in tensor.slots[:1] for p in _parts(tensor, s))
    return count * (BYTES_OF[source.tensors[tensor.slots[0].tensor].dtype] + 8) + 2 * tensor_bytes(planned.type, [count])


def _write_tensor(
    file: _Summed, planned: PlannedTensor, source: TensorSource, importance: Importance | None, encode: Encoder,
    progress: Progress | None,
) -> None:  # fmt: skip
    written = 0
    for number, slot in enumerate(planned.tensor.slots):
        weights = importance.of(planned.tensor, number) if importance is not None else None
        for rows in matrices(source, planned.tensor, slot):
            data = encode(planned.type, rows, weights)
            file.write(data)
            written += len(data)
            if progress:
                progress(len(data), planned.tensor.name)
    assert written == planned.nbytes, f"{planned.tensor.name}: {written} bytes, planned were {planned.nbytes}"
    file.write(bytes(padded(written) - written))


def matrices(source: TensorSource, tensor: GgufTensor, slot: Slot) -> Iterator[Tensor]:
    """The values of one of a tensor's weights as the file holds them: float32 [rows, columns], some rows at a time.

    Raises CheckpointError where a value is no number.
    """
    for part in _parts(tensor, slot):
        weight = source.read(slot.tensor, part).to(torch.float32)
        for transform in tensor.transforms:
            weight = transform.apply(weight)
        _check_values(weight, slot, tensor)
        yield weight.reshape(-1, tensor.columns)


def _check_values(weight: Tensor, slot: Slot, tensor: GgufTensor) -> None:
    highest = largest_magnitude(weight)
    if not highest <= LARGEST:
        what = "NaN or infinity" if not math.isfinite(highest) else f"{highest:.3g}, more than any scale can hold"
        raise CheckpointError(
            f"{slot.tensor} holds {what}, so {tensor.name} cannot be written", "take the tensor from the original checkpoint"
        )


def _parts(tensor: GgufTensor, slot: Slot) -> Iterator[Part]:
    """Parts of the stored tensor that make up the weight, in order."""
    rows = max(1, ELEMENTS // max(1, math.prod(slot.shape[1:])))
    if not tensor.by_rows or len(slot.shape) < 2 or slot.shape[0] <= rows:
        yield slot.part
        return
    whole = slot.part and isinstance(slot.part[-1], slice)
    before, start = (slot.part[:-1], slot.part[-1].start or 0) if whole else (slot.part, 0)  # type: ignore[union-attr]
    for first in range(0, slot.shape[0], rows):
        yield (*before, slice(start + first, start + min(first + rows, slot.shape[0])))


assert ALIGNMENT == gguf.GGUF_DEFAULT_ALIGNMENT
