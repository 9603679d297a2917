"""Which bytes of a stored tensor make up a part of it.

Tensors lie row by row, so a part is a number of runs, ranges of bytes without a break:

    [E, 2I, H] at (7,)                     1 run
    [E, 2I, H] at (7, slice(0, I))         1 run: half of one expert
    [E, 2I, H] at (slice(0, 3), slice(0, I))   3 runs

Everything behind the last dimension that the part restricts is one piece; the dimensions before it are walked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from qwench.checkpoint.source import Part


def part_shape(shape: tuple[int, ...], part: Part) -> tuple[int, ...]:
    """The shape of `tensor[part]`. Raises IndexError where the part does not fit, ValueError for steps other than 1."""
    ranges = _ranges(shape, part)
    kept = [i for i in range(len(shape)) if i >= len(part) or isinstance(part[i], slice)]
    return tuple(len(ranges[i]) for i in kept)


def part_runs(shape: tuple[int, ...], part: Part, width: int) -> Iterator[tuple[int, int]]:
    """(offset, length) in bytes of each run, in the order of the result; `width` is the bytes of one element. Errors as in `part_shape`."""
    ranges = _ranges(shape, part)
    if any(len(r) == 0 for r in ranges):
        return
    restricted = [i for i, r in enumerate(ranges) if len(r) != shape[i]]
    last = restricted[-1] if restricted else 0
    piece = math.prod(shape[last + 1 :]) * width
    length = (len(ranges[last]) if ranges else 1) * piece
    strides = [math.prod(shape[i + 1 :]) * width for i in range(last)]
    first = ranges[last].start * piece if ranges else 0
    for index in itertools.product(*ranges[:last]):
        yield first + sum(i * stride for i, stride in zip(index, strides, strict=True)), length


def joined(shape: tuple[int, ...], outer: Part, inner: Part) -> Part:
    """The part of a tensor of this shape that is `tensor[outer][inner]`. Errors as in `part_shape`."""
    left, result = list(inner), list[int | slice]()
    for axis, kept in enumerate(outer):
        if not isinstance(kept, slice) or not left:
            result.append(kept)
            continue
        here = range(*kept.indices(shape[axis]))
        index = left.pop(0)
        if isinstance(index, slice):
            chosen = here[index]
            result.append(slice(chosen.start, chosen.stop, chosen.step))
        else:
            result.append(here[index])
    return (*result, *left)


def _ranges(shape: tuple[int, ...], part: Part) -> list[range]:
    """The indices that the part keeps of every dimension, with Python's meaning of negative and open ends."""
    if len(part) > len(shape):
        raise IndexError(f"a part of {len(part)} dimensions of a tensor of shape {list(shape)}")
    ranges = [range(n) for n in shape]
    for i, (index, size) in enumerate(zip(part, shape, strict=False)):
        if isinstance(index, slice):
            ranges[i] = range(*index.indices(size))
            if ranges[i].step != 1:
                raise ValueError(f"{index}: only steps of 1 are read")
        else:
            if not -size <= index < size:
                raise IndexError(f"index {index} of dimension {i} of a tensor of shape {list(shape)}")
            ranges[i] = range(index % size, index % size + 1)
    return ranges
