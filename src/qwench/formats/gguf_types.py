"""Which type each tensor of a GGUF file gets: the mixes of llama.cpp, followed rule by rule.

A file type such as Q4_K_M is a default (Q4_K) and a list of exceptions: the output matrix has 6 bits, values and down projections have more bits in some layers, and
so on. The rules are those of `llama_tensor_get_type_impl` in src/llama-quant.cpp for the architectures `qwen35` and `qwen35moe`; the tests compare every choice with
what llama.cpp itself chose. They go through the tensors in one order and count, so that the layer "i of n" of a rule is a matter of that order.

A row that a type's blocks do not divide falls back to a type with blocks of 32, and where not even those fit, to F16: as llama.cpp does, and it is said in the plan.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import gguf

from qwench.formats.gguf_tensors import GgufTensor, block_of

FILE_TYPES: dict[str, tuple[int, str]] = {
    "F32": (0, "F32"), "F16": (1, "F16"), "BF16": (32, "BF16"), "Q8_0": (7, "Q8_0"), "Q6_K": (18, "Q6_K"),
    "Q5_K_M": (17, "Q5_K"), "Q5_K_S": (16, "Q5_K"), "Q5_1": (9, "Q5_1"), "Q5_0": (8, "Q5_0"),
    "Q4_K_M": (15, "Q4_K"), "Q4_K_S": (14, "Q4_K"), "Q4_1": (3, "Q4_1"), "Q4_0": (2, "Q4_0"), "IQ4_NL": (25, "IQ4_NL"), "IQ4_XS": (30, "IQ4_XS"),
    "Q3_K_L": (13, "Q3_K"), "Q3_K_M": (12, "Q3_K"), "Q3_K_S": (11, "Q3_K"),
}  # fmt: skip
"""Name of a file type -> (llama.cpp's number for it, the type that most tensors get)."""

TYPES = tuple(dict.fromkeys(default for _, default in FILE_TYPES.values()))
"""Every type that a tensor can have."""
UNQUANTIZED = ("F32", "F16", "BF16")
FALLBACK = {"IQ4_XS": "IQ4_NL", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that blocks of 256 do not divide."""


def block_size(kind: str) -> int:
    """Values in a block of a type."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]


def tensor_bytes(kind: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this type and shape [.., columns]."""
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    count = 1
    for n in shape:
        count *= n
    assert count % size == 0, f"{list(shape)} are no whole blocks of {kind}"
    return count // size * width


@dataclass(frozen=True)
class Override:
    """A type for the tensors of some roles, whatever the mix says: `Override("mtp.*", "Q8_0")`. `*` does not reach into `mtp.` and `vision.`."""

    roles: str
    type: str

    def names(self, tensor: GgufTensor) -> bool:
        for component in ("mtp.", "vision."):
            if tensor.role.startswith(component) != self.roles.startswith(component):
                return False
        return fnmatch.fnmatchcase(tensor.role, self.roles)


@dataclass
class Mix:
    """One walk over the tensors of a file.

    Attributes:
        file_type: a key of `FILE_TYPES`.
        queries_per_key: heads of queries for each head of keys.
        experts: routed experts; 0 in a dense model.
        blocks: blocks of the file, those of the MTP head included.
        values: matrices of attention values (`attn_v`, and `attn_qkv` of Gated DeltaNet).
        tied: no output matrix: the embedding is one.
        importance: an importance matrix will be used.
    """

    file_type: str
    queries_per_key: int
    experts: int
    blocks: int
    values: int
    tied: bool
    importance: bool
    _values_seen: int = 0
    _downs_seen: int = 0

    def choose(self, tensor: GgufTensor) -> str:
        """The type of a quantizable tensor, before any fallback. Ask in the file's order, once."""
        default = FILE_TYPES[self.file_type][1]
        stem = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if stem == "output" or (stem == "token_embd" and self.tied):
            return self._output(default, tensor.columns)
        if stem in ("attn_v", "attn_qkv"):
            self._values_seen += 1
            return self._value(default, self._values_seen - 1)
        if stem == "attn_k" and self.experts == 8:
            return "Q8_0"
        if stem.startswith("ffn_down"):
            self._downs_seen += 1
            return self._down(default, block_of(tensor.name) if self.experts > 1 else self._downs_seen - 1)
        if stem == "attn_output":
            return self._attention_output(default)
        return default

    def _output(self, default: str, columns: int) -> str:
        if columns % block_size(default):
            return "Q8_0"
        return default if default in (*UNQUANTIZED, "Q8_0") else "Q6_K"

    def _value(self, default: str, place: int) -> str:
        kind = default
        if self.file_type == "Q3_K_M":
            kind = "Q5_K" if place < 2 else "Q4_K"
        elif self.file_type == "Q3_K_L" or (self.file_type in ("IQ4_NL", "IQ4_XS") and self.queries_per_key >= 4):
            kind = "Q5_K"
        elif self.file_type in ("Q4_K_M", "Q5_K_M") and more_bits(place, self.values):
            kind = "Q6_K"
        elif self.file_type == "Q4_K_S" and place < 4:
            kind = "Q5_K"
        return "Q8_0" if self.experts == 8 else kind

    def _down(self, default: str, place: int) -> str:
        first = place < self.blocks // 8
        if self.file_type == "Q3_K_M":
            return "Q5_K" if place < self.blocks // 16 else "Q4_K"
        if self.file_type == "Q3_K_L":
            return "Q5_K"
        if self.file_type in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if more_bits(place, self.blocks) else default
        if first and (self.file_type == "Q4_K_S" or (self.file_type in ("IQ4_NL", "IQ4_XS") and not self.importance)):
            return "Q5_K"
        if first and self.importance and self.file_type in ("Q4_0", "Q5_0"):
            return self.file_type.replace("_0", "_1")
        return default

    def _attention_output(self, default: str) -> str:
        if self.experts == 8:
            five = ("Q3_K_S", "Q3_K_M", "IQ4_NL", "IQ4_XS", "Q4_K_S", "Q4_K_M")
            return "Q5_K" if self.file_type in five else default
        return {"Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.file_type, default)


def more_bits(place: int, count: int) -> bool:
    """Whether a layer is one of those to which a mix gives more bits: the first and the last eighth, and every third in between."""
    return place < count // 8 or place >= 7 * count // 8 or (place - count // 8) % 3 == 2


def fitting(kind: str, columns: int) -> str:
    """The type that a row of so many columns can have where `kind` was meant."""
    if columns % block_size(kind) == 0:
        return kind
    smaller = FALLBACK.get(kind, kind)
    return smaller if columns % block_size(smaller) == 0 else "F16"
