"""GGUF's number types: values to bytes and back.

    F32 F16 BF16                            as they are
    Q8_0 Q5_0 Q5_1 Q4_0 Q4_1 IQ4_NL         blocks of 32, see legacy_quants
    Q6_K Q5_K Q4_K Q3_K IQ4_XS              blocks of 256 in groups of 16 or 32, whose scales are themselves quantized, see k_quants

All types but the first three have a choice of scales, which an importance of the input channels can guide.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qwench.numerics import ggml_native

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Encoder(Protocol):
    """Turns a matrix into the bytes of a type."""

    def __call__(self, kind: str, rows: Tensor, importance: Tensor | None = None) -> bytes:
        """float32 [rows, columns], and float32 [columns] or None."""
        ...


def encoder() -> Encoder:
    """llama.cpp's own quantizer where it is installed, else ours."""
    return encode_with_llama_cpp if ggml_native.library() is not None else encode


def encode_with_llama_cpp(kind: str, rows: Tensor, importance: Tensor | None = None) -> bytes:
    """See `Encoder`."""
    return _plain(kind, rows) if kind in PLAIN else ggml_native.encode_native(kind, rows, importance)


def _plain(kind: str, rows: Tensor) -> bytes:
    values = rows.to(PLAIN[kind]).contiguous()
    return values.view(torch.uint8).numpy().tobytes()


def encode(kind: str, rows: Tensor, importance: Tensor | None = None) -> bytes:
    """See `Encoder`."""
    assert kind in PLAIN
    return _plain(kind, rows)
