"""llama.cpp's own quantizer, where it is installed: `ggml_quantize_chunk` out of the shared library of the `xllamacpp` package.

No compiler is needed and nothing else of that package is touched. Ours (`qwench.numerics.ggml`) gives the same bytes; this one is faster.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import torch
from torch import Tensor


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library with its one function declared; None where the package is absent or lacks it."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    for path in sorted(Path(spec.origin).parent.glob("xllamacpp*.so")):
        try:
            found = ctypes.CDLL(str(path))
            quantize = found.ggml_quantize_chunk
        except (OSError, AttributeError):
            continue
        quantize.restype = ctypes.c_size_t
        quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        return found
    return None


def encode_native(kind: str, rows: Tensor, importance: Tensor | None = None) -> bytes:
    """Quantize a matrix as llama.cpp does, on as many threads as PyTorch would use.

    Args:
        kind: a quantized GGUF type, such as `Q4_K`.
        rows: float32 [rows, columns], finite; whole blocks in a row.
        importance: float32 [columns], or None.
    """
    native = library()
    assert native is not None, "ask library() first"
    source = rows.to(torch.float32).contiguous()
    weights = None if importance is None else importance.to(torch.float32).contiguous()
    count, columns = source.shape
    number = gguf.GGMLQuantizationType[kind]
    size, width = gguf.GGML_QUANT_SIZES[number]
    assert columns % size == 0, f"rows of {columns} are no whole blocks of {kind}"
    target = torch.empty(count * (columns // size) * width, dtype=torch.uint8)

    def work(first: int, last: int) -> None:
        pointer = None if weights is None else weights.data_ptr()
        # the start is in elements of the whole matrix, the target's first byte follows from it
        native.ggml_quantize_chunk(
            int(number), source.data_ptr(), target.data_ptr(), first * columns, last - first, columns, pointer
        )

    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        work(0, count)
    else:
        share = -(-count // threads)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda first: work(first, min(first + share, count)), range(0, count, share)))
    return target.numpy().tobytes()
