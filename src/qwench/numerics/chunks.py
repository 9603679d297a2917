"""Working through a matrix in pieces that fit the cache.

Encoding is some thirty simple passes over the weights. Done on a whole matrix, each pass would travel to main memory and back, and the
temporaries would be four times the size of the bf16 weight. Done on tiles of 128 Ki elements with buffers that are used over and over, the
passes stay in the second-level cache, and memory follows the tile, not the matrix.

Tiles are independent, so threads share them out; PyTorch lets go of the interpreter lock inside its kernels. Each worker runs its kernels on
one thread: a kernel of 10 microseconds is too short to be split further. Tile boundaries and the order of sums do not depend on the number of
threads, so neither do the results.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from qwench.numerics.quantized import RoundTrip

TILE_ELEMENTS = 1 << 17
"""Elements in a tile: float32 buffers of 512 KiB. Smaller tiles lose more to the overhead of the calls than they win in the cache."""

DEVICE_ELEMENTS = 1 << 24
"""On a GPU, which wants large pieces and does its own sharing out."""

INT_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type whose bits are looked at, by bytes per element."""


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a matrix."""

    rows: slice
    columns: slice

    def of(self, matrix: Tensor) -> Tensor:
        return matrix[self.rows, self.columns]


@dataclass
class Workspace:
    """Buffers of one worker, by name; handed out again and again. `device` is where they are."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009  a constant
    buffers: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialized contiguous tensor that stays valid until the same name is taken again."""
        size = math.prod(shape)
        have = self.buffers.get((name, dtype))
        if have is None or have.numel() < size:
            have = self.buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return have[:size].view(shape)


@dataclass(frozen=True)
class ErrorSums:
    """Sums over a tile from which `RoundTrip` is made: |error|, error squared and weight squared are summed, and the largest |error|."""

    absolute: float
    largest: float
    square: float
    weight_square: float


Answer = TypeVar("Answer")


def tiles(rows: int, columns: int, height: int = 1, width: int | None = None, elements: int = TILE_ELEMENTS) -> Iterator[Tile]:
    """Cuts a matrix into tiles of about `elements`, whose edges are multiples of `height` rows and `width` columns (None: whole rows)."""
    across = columns if width is None else min(columns, max(1, elements // (height * width)) * width)
    down = max(1, elements // (max(1, across) * height)) * height
    for top in range(0, rows, down):
        for left in range(0, columns, max(1, across)):
            yield Tile(slice(top, min(top + down, rows)), slice(left, min(left + across, columns)))


_POOL_LOCK = threading.Lock()
_POOL: dict[int, ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    """The shared pool of so many workers; each of them keeps PyTorch to one thread.

    PyTorch remembers the number last set anywhere as the default for threads that it has not met yet. So all workers are started and set at
    once, and then the caller's own number is set again, which makes it the default as before.
    """
    with _POOL_LOCK:
        if threads not in _POOL:
            pool, started = ThreadPoolExecutor(threads, "encode"), threading.Barrier(threads)

            def start() -> None:
                torch.get_num_threads()  # PyTorch meets the thread, and gives it the default
                torch.set_num_threads(1)
                started.wait()

            for worker in [pool.submit(start) for _ in range(threads)]:
                worker.result()
            torch.set_num_threads(torch.get_num_threads())
            _POOL[threads] = pool
        return _POOL[threads]


def work_through(
    matrix: Tensor, work: Callable[[Tile, Workspace], Answer], height: int = 1, width: int | None = None
) -> list[Answer]:
    """Does `work` on every tile of a matrix, on as many threads as PyTorch would use here (`torch.get_num_threads()`).

    Tile edges are multiples of `height` rows and `width` columns (None: whole rows). Answers come in the order of the tiles.
    """
    on_cpu = matrix.device.type == "cpu"
    pieces = list(tiles(matrix.shape[0], matrix.shape[1], height, width, TILE_ELEMENTS if on_cpu else DEVICE_ELEMENTS))
    threads = min(torch.get_num_threads(), len(pieces)) if on_cpu else 1
    if threads <= 1:
        workspace = Workspace(matrix.device)
        return [work(tile, workspace) for tile in pieces]
    share = math.ceil(len(pieces) / threads)

    def run(first: int) -> list[Answer]:
        workspace = Workspace()
        return [work(tile, workspace) for tile in pieces[first : first + share]]

    futures = [_pool(threads).submit(run, first) for first in range(0, len(pieces), share)]
    return [answer for future in futures for answer in future.result()]


def round_trip(sums: list[ErrorSums], elements: int) -> RoundTrip:
    """The error of a whole matrix of so many elements from the sums of its tiles."""
    square, weight_square = math.fsum(s.square for s in sums), math.fsum(s.weight_square for s in sums)
    relative = math.sqrt(square / weight_square) if weight_square > 0 else 0.0
    return RoundTrip(math.fsum(s.absolute for s in sums) / elements, max(s.largest for s in sums), relative)


def error_sums(error: Tensor, weight: Tensor) -> ErrorSums:
    """Sums over one tile. `error` and `weight` are contiguous float32 of one size; `error` is overwritten.

    Squares are summed in float32 within a tile; of weights beyond 1e17 or below 1e-17 they would overflow or vanish, so those tiles are summed
    in float64.
    """
    error, weight = error.view(-1), weight.view(-1)
    absolute = torch.abs(error, out=error)
    square, weight_square = float(torch.dot(error, error)), float(torch.dot(weight, weight))
    if not 1e-30 < weight_square < 1e36 or not square < 1e36:
        square, weight_square = float(error.double().square().sum()), float(weight.double().square().sum())
        return ErrorSums(float(absolute.double().sum()), float(absolute.max()), square, weight_square)
    return ErrorSums(float(absolute.sum()), float(absolute.max()), square, weight_square)


def largest_magnitude(weight: Tensor) -> float:
    """The largest |value| of a floating-point matrix or vector; not finite if any value is not (NaN or infinity). One pass, no copy.

    Magnitudes of IEEE numbers order like their bits without the sign, with infinity and NaN above everything else.
    """
    if not weight.numel():
        return 0.0
    if weight.device.type != "cpu":
        return float(weight.abs().amax())
    matrix = weight.reshape(1, -1) if weight.dim() < 2 else weight.flatten(0, -2)
    bits = matrix.view(INT_OF[matrix.element_size()])
    mask = torch.iinfo(bits.dtype).max
    workspace, largest = Workspace(), 0
    for tile in tiles(*matrix.shape):
        part = tile.of(bits)
        magnitude = workspace.take("magnitude", tuple(part.shape), bits.dtype)
        largest = max(largest, int(torch.bitwise_and(part, mask, out=magnitude).max()))
    return float(torch.tensor([largest], dtype=bits.dtype).view(weight.dtype)[0])


def finite(weight: Tensor) -> bool:
    """Whether a weight holds no NaN and no infinity. One pass, no copy."""
    return math.isfinite(largest_magnitude(weight))
