"""How engines want the bytes: one module for each container, and the table of them.

A container is a module with the functions of `Container`. `compressed_tensors`, `gptq` and `auto_round` know which tensors stand for a quantized
weight, byte by byte, and what `config.json` says about them; none of them knows how the numbers were chosen. `release` reads them all back.
To add one: write the module, add a line to `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from qwench.checkpoint.source import Part, TensorEntry, TensorSpec
from qwench.formats import auto_round, compressed_tensors, gptq
from qwench.numerics import Quantized, Scheme

__all__ = ["FORMATS", "Container"]


class Container(Protocol):
    """What every container does. The modules are the implementations: nothing has to be made.

    Attributes:
        METHOD: its name in `quant_method`.
        CODES: last name of the tensor of codes; of several, the first that a module has.
        SCALES: last name of the tensor of scales.
        SUFFIXES: last names of tensors that only a quantized module has.
    """

    @property
    def METHOD(self) -> str: ...
    @property
    def CODES(self) -> tuple[str, ...]: ...
    @property
    def SCALES(self) -> str: ...
    @property
    def SUFFIXES(self) -> tuple[str, ...]: ...

    def complaint(self, scheme: Scheme, shape: tuple[int, ...]) -> str | None:
        """Why it cannot hold a weight of this shape (out, in) in this scheme, or None. Schemes that an engine would misread are refused here."""

    def notes(self, schemes: Iterable[Scheme]) -> list[str]:
        """What a person should know about a release with these schemes."""

    def layout(self, module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str = "BF16") -> list[TensorSpec]:
        """The tensors that stand for one quantized weight, from its shape alone; `dtype` is what scales are stored in where the scheme leaves it open."""

    def pack(self, module: str, quantized: Quantized) -> dict[str, Tensor]:
        """The tensors of one quantized weight by name, as `layout` lists them."""

    def unpack(
        self,
        module: str,
        tensors: Mapping[str, Tensor],
        scheme: Scheme,
        shape: tuple[int, ...],
        config: Mapping[str, Any] | None = None,
    ) -> Quantized:
        """The inverse of `pack`; `config` is the quantization_config of another writer. Raises CheckpointError."""

    def quantization_config(self, assigned: Mapping[str, Scheme], kept: Collection[str]) -> dict[str, Any]:
        """What `config.json` says under that name: module -> scheme of every quantized weight, and all other linear layers."""

    def sidecars(self, config: Mapping[str, Any]) -> dict[str, bytes]:
        """Further files that hold this quantization_config, by name."""

    def scheme_of(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """The scheme of a module according to anybody's quantization_config; None where it is not quantized. Raises CheckpointError."""

    def shape_of(
        self, module: str, scheme: Scheme, tensors: Mapping[str, TensorEntry], read: Callable[[str], Tensor]
    ) -> tuple[int, int]:
        """(out, in) of a stored weight."""

    def row_step(self, scheme: Scheme) -> int:
        """Rows that can only be read together."""

    def part_of(self, suffix: str, scheme: Scheme, first: int, last: int) -> Part | None:
        """The part of a stored tensor that rows first..last need, both multiples of `row_step` or the end; None: it is not needed."""


FORMATS: dict[str, Container] = {"compressed-tensors": compressed_tensors, "gptq": gptq, "auto-round": auto_round}
"""Containers by the name that recipes and `quant_method` use."""
