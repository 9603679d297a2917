"""GGUF's number types: values to bytes and back.

    F32 F16 BF16                            as they are
    Q8_0 Q5_0 Q5_1 Q4_0 Q4_1 IQ4_NL IQ4_XS  see legacy_quants
    Q6_K Q5_K Q4_K Q3_K                     see k_quants

All but the first four have a choice of scales, which an importance of the input channels can guide. Two encoders give the same bytes: llama.cpp's own, where it is
installed, and ours; `encoder` takes whichever is faster. Decoding is the gguf library's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import gguf
import numpy as np
import torch
from torch import Tensor

from qwench.numerics import k_quants, legacy_quants
from qwench.numerics.ggml_native import encode_native, library
from qwench.numerics.ggml_search import Floats
from qwench.numerics.k_quants import Bytes

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED: dict[str, Callable[[Floats, Floats | None], Bytes]] = {
    "Q8_0": legacy_quants.encode_q8_0, "Q5_0": legacy_quants.encode_q5_0, "Q5_1": legacy_quants.encode_q5_1,
    "Q4_0": legacy_quants.encode_q4_0, "Q4_1": legacy_quants.encode_q4_1,
    "IQ4_NL": legacy_quants.encode_iq4_nl, "IQ4_XS": legacy_quants.encode_iq4_xs,
    "Q6_K": k_quants.encode_q6_k, "Q5_K": k_quants.encode_q5_k, "Q4_K": k_quants.encode_q4_k, "Q3_K": k_quants.encode_q3_k,
}  # fmt: skip
ELEMENTS = 1 << 16
"""Values that are encoded at a time: few enough for the cache, enough to make light of the calls."""


class Encoder(Protocol):
    """Turns a matrix into the bytes of a type."""

    def __call__(self, kind: str, rows: Tensor, importance: Tensor | None = None) -> bytes:
        """float32 [rows, columns], all finite, and float32 [columns] or None; a row is whole blocks."""
        ...


OURS_IS_FASTER = ("IQ4_NL", "IQ4_XS")
"""Types whose nearest level llama.cpp finds by bisection, value by value; we look it up, which is some five times as fast."""


def encoder() -> Encoder:
    """The faster of llama.cpp's own quantizer, where it is installed, and ours."""
    return _fastest if library() is not None else encode


def _fastest(kind: str, rows: Tensor, importance: Tensor | None = None) -> bytes:
    return (encode if kind in OURS_IS_FASTER else encode_with_llama_cpp)(kind, rows, importance)


def encode_with_llama_cpp(kind: str, rows: Tensor, importance: Tensor | None = None) -> bytes:
    """See `Encoder`; quantized by llama.cpp."""
    return _plain(kind, rows) if kind in PLAIN else encode_native(kind, rows, importance)


def encode(kind: str, rows: Tensor, importance: Tensor | None = None) -> bytes:
    """See `Encoder`; on as many threads as PyTorch would use, with the same result whatever their number."""
    if kind in PLAIN:
        return _plain(kind, rows)
    x = rows.to(torch.float32).contiguous().numpy()
    weights = None if importance is None else importance.to(torch.float32).numpy()
    height = max(1, ELEMENTS // x.shape[1])

    def work(first: int) -> bytes:
        part = x[first : first + height]
        spread = None if weights is None else np.ascontiguousarray(np.broadcast_to(weights, part.shape))
        blocks = part if kind not in OF_BLOCKS else part.reshape(-1, k_quants.BLOCK)
        return QUANTIZED[kind](blocks, None if spread is None else spread.reshape(blocks.shape)).tobytes()

    places, threads = range(0, len(x), height), torch.get_num_threads()
    if threads <= 1 or len(places) == 1:
        return b"".join(map(work, places))
    with ThreadPoolExecutor(threads) as pool:
        return b"".join(pool.map(work, places))


OF_BLOCKS = ("Q6_K", "Q5_K", "Q4_K", "Q3_K")
"""Types whose encoders take single blocks; the others take rows."""


def decode(kind: str, data: bytes, columns: int) -> Tensor:
    """float32 [rows, columns] that the bytes of a type stand for."""
    number = gguf.GGMLQuantizationType[kind]
    stored = np.frombuffer(data, dtype=np.uint8)
    if kind in PLAIN:
        return torch.frombuffer(bytearray(data), dtype=PLAIN[kind]).to(torch.float32).reshape(-1, columns)
    size, width = gguf.GGML_QUANT_SIZES[number]
    return torch.from_numpy(gguf.dequantize(stored.reshape(-1, columns // size * width), number)).reshape(-1, columns)


def _plain(kind: str, rows: Tensor) -> bytes:
    return rows.to(PLAIN[kind]).contiguous().view(torch.uint8).numpy().tobytes()
