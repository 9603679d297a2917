"""Where a network is run, and in which numbers.

Weights of one layer, what it reads and what it puts out are on the device; everything else (rows between layers, codes, files) is in main memory or on the disk. Layers compute in
bfloat16, as engines do, on GPUs and on processors that have instructions for it, unless float32 is asked for; elsewhere in float32, which is faster there. Sums over tokens, factors of
second moments and errors are float32 or better wherever layers run. What is measured against a source (divergence, acceptance) is
float32 everywhere unless asked otherwise: the rounding of bfloat16 would be a good part of what a good release differs by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qwench.errors import UserError, suggestion

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What can be computed in; float16 overflows in Gated DeltaNet."""
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}
"""What a processor with fast bfloat16 says of itself. Others emulate it, several times slower than float32."""


@dataclass(frozen=True)
class Place:
    """Attributes:
    device: of the weights and the arithmetic.
    dtype: of the arithmetic, and of the weights while they are used.
    """

    device: torch.device = torch.device("cpu")  # noqa: RUF009  a constant
    dtype: torch.dtype = torch.float32

    @property
    def exact(self) -> Place:
        """The same device in float32."""
        return replace(self, dtype=torch.float32)

    @property
    def says(self) -> tuple[str, str]:
        """Device and dtype for the record: (`cuda:0`, `bfloat16`)."""
        return str(self.device), str(self.dtype).removeprefix("torch.")


CPU = Place()


def place_of(device: str = "auto", compute: str | None = None) -> Place:
    """What a person asks for.

    Args:
        device: `cpu`, `cuda`, `cuda:1`; `auto` is the first GPU where there is one that PyTorch can use, else the processor.
        compute: a key of `DTYPES`; None or `auto`: bfloat16 where the device multiplies it natively, else float32.

    Raises:
        UserError: there is no such device, or no such dtype.
    """
    compute = None if compute == "auto" else compute
    if compute is not None and compute not in DTYPES:
        raise UserError(
            f"cannot compute in {compute!r}{suggestion(compute, DTYPES)}", f"give auto or one of {', '.join(DTYPES)}"
        )
    chosen = _device("cuda" if device == "auto" and torch.cuda.is_available() else device)
    own = "bfloat16" if chosen.type == "cuda" or multiplies_bfloat16() else "float32"
    return Place(chosen, DTYPES[compute or own])


def multiplies_bfloat16(told: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor has instructions that multiply bfloat16 (AVX512-BF16 or AMX), by the kernel's list; false where there is no such list."""
    try:
        lines = told.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return bool(BFLOAT16_FLAGS & set(flags))


def _device(name: str) -> torch.device:
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise UserError(
            f"there is no device {name!r}{suggestion(kind, ('auto', 'cpu', 'cuda'))}", "give auto, cpu, cuda or cuda:NUMBER"
        )
    if not torch.cuda.is_available():
        why = "this build of PyTorch has no CUDA" if torch.version.cuda is None else "PyTorch finds no GPU that it can use"
        raise UserError(f"{name}: {why}", "install PyTorch for your CUDA version (pytorch.org), or give --device cpu")
    index, count = int(number or 0), torch.cuda.device_count()
    if index >= count:
        raise UserError(f"{name}: PyTorch sees {count} GPUs, counted from 0", "give cuda:NUMBER of one of them")
    return torch.device("cuda", index)


def peak_vram(place: Place) -> int | None:
    """The most bytes of GPU memory that this process has held for tensors so far; None on the processor."""
    return torch.cuda.max_memory_reserved(place.device) if place.device.type == "cuda" else None


def gpu_memory() -> int | None:
    """Bytes of the first GPU's memory; None where PyTorch finds no GPU."""
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


@contextmanager
def memory_is_told(place: Place) -> Iterator[None]:
    """A GPU that is too small is said to be so. Raises UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        total = torch.cuda.get_device_properties(place.device).total_memory if place.device.type == "cuda" else 0
        raise UserError(
            f"{place.device} has {total / 2**30:.1f} GiB, and that is too little: {str(error).splitlines()[0]}",
            "free it of other programs, give shorter calibration rows (--length), or --device cpu; what is finished is kept",
        ) from error
