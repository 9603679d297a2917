"""Doing the jobs of a plan: weights are read, rounded, packed and put in their places; the rest goes through bit for bit.

One set of weights is in memory at a time. Copies run beside it on a thread of their own: they wait for the disk, rounding waits for the
processor.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwench import numerics
from qwench.checkpoint.source import TORCH_DTYPE, StoredSource, TensorEntry
from qwench.checkpoint.writer import CheckpointWriter
from qwench.errors import CheckpointError
from qwench.formats import FORMATS, adapter
from qwench.methods.rtn import round_fused
from qwench.models.map import Slot
from qwench.numerics import Quantized, Scheme
from qwench.result import TensorError
from qwench.steps.planning.jobs import Job

Done = Callable[[Job], None]
"""Called after each job, from the thread that did it."""

ERROR = "error "
"""What the keys of remarks about round-trip errors begin with."""

MEND = "the file is damaged or its training diverged: get a sound copy"
EXPONENT: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
}
"""Of each stored dtype, the integer with its bits and the exponent that only infinities and NaN have."""


def do_jobs(jobs: Sequence[Job], source: StoredSource, writer: CheckpointWriter, done: Done) -> None:
    """Do every job that an earlier run left.

    Raises:
        CheckpointError: a weight holds NaN or infinity, or a file changed under us.
        OutputError: the disk.
    """
    left: list[Job] = []
    for job in jobs:
        if all(tensor.name in writer.done for tensor in job.written):
            done(job)
        else:
            left.append(job)
    stop = threading.Event()

    def work(mine: list[Job]) -> None:
        for job in mine:
            if stop.is_set():
                return
            do_job(job, source, writer)
            done(job)

    with ThreadPoolExecutor(2, "job") as pool:
        lanes = [[j for j in left if j.copied], [j for j in left if j.quantized]]
        futures = [pool.submit(work, lane) for lane in lanes]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
        for future in futures:
            future.result()


def do_job(job: Job, source: StoredSource, writer: CheckpointWriter) -> None:
    """One job: a copy, or a set of weights."""
    if job.copied:
        writer.put(job.copied.name, stored_chunks(source, job.copied, job.outputs[0].dtype))
    elif job.quantized:
        quantize_set(job, source, writer)


def finite_chunks(source: StoredSource, entry: TensorEntry) -> Iterator[memoryview]:
    """The bytes of a stored tensor as they pass by, looked at for NaN and infinity."""
    looked_at = EXPONENT.get(entry.dtype)
    for chunk in source.chunks(entry.name):
        if looked_at is not None:
            kind, exponent = looked_at
            if ((np.frombuffer(chunk, kind) & kind(exponent)) == exponent).any():
                raise _not_finite(entry.name, source)
        yield chunk


def stored_chunks(source: StoredSource, entry: TensorEntry, dtype: str) -> Iterator[memoryview]:
    """The bytes of a stored tensor as a file is to hold it: its own, or those of each number in another dtype."""
    for chunk in finite_chunks(source, entry):
        if dtype == entry.dtype:
            yield chunk
        else:
            numbers = torch.frombuffer(bytearray(chunk), dtype=TORCH_DTYPE[entry.dtype]).to(TORCH_DTYPE[dtype])
            yield memoryview(numbers.view(torch.uint8).numpy().data)


def quantize_set(job: Job, source: StoredSource, writer: CheckpointWriter) -> None:
    """Read, round, pack and write the weights of one set."""
    weights = job.quantized
    assert weights is not None
    read = [read_weight(slot, source) for slot in weights.slots]
    for slot, quantized in zip(weights.slots, round_fused(read, weights.scheme), strict=True):
        write_quantized(slot, weights.scheme, quantized, job.format, writer)


def write_quantized(slot: Slot, scheme: Scheme, quantized: Quantized, format: str, writer: CheckpointWriter) -> None:
    """Pack one quantized weight in a container (see `FORMATS`) and write it, its round-trip error first."""
    error = quantized.error
    assert error is not None
    remark = TensorError(
        module=slot.module,
        role=slot.role,
        layer=slot.layer,
        scheme=scheme.label,
        mean_abs=error.mean_abs,
        max_abs=error.max_abs,
        relative_rms=error.relative_rms,
    )
    writer.remark(ERROR + slot.module, remark.model_dump())
    for name, tensor in FORMATS[format].pack(slot.module, quantized).items():
        writer.write(name, tensor)
    if quantized.low_rank is not None:
        for name, tensor in adapter.pack(slot.module, quantized.low_rank).items():
            writer.write(name, tensor)


def errors_of(writer: CheckpointWriter) -> list[TensorError]:
    """The round-trip errors of all quantized weights, those of an earlier run included."""
    return [TensorError.model_validate(data) for key, data in writer.remarks.items() if key.startswith(ERROR)]


def read_weight(slot: Slot, source: StoredSource) -> Tensor:
    """A weight [out, in] as stored. Raises CheckpointError where it is not finite."""
    weight = source.read(slot.tensor, slot.part)
    if not math.isfinite(numerics.largest_magnitude(weight)):
        raise _not_finite(slot.tensor, source)
    return weight


def _not_finite(tensor: str, source: StoredSource) -> CheckpointError:
    file = source.folder / source.tensors[tensor].file
    return CheckpointError(f"{tensor} in {file} holds NaN or infinity", MEND)
