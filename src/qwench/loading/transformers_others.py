"""How transformers 5.23 decides in formats of other writers: `FineGrainedFP8HfQuantizer`, `AwqQuantizer`.

Both replace modules of class Linear whose names the list `modules_to_not_convert` does not mean: as an expression from the beginning of a name to the end of a component, or as the end of a name.
FP8 also replaces the module that holds a layer's experts, AWQ does not. Where FP8 has no list, and for AWQ in any case, the output head is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwench.loading.parts import Module
from qwench.loading.patterns import expression, renamed
from qwench.loading.stored import Stored, awq, block_fp8, tensor_fp8

BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


class Converting:
    """Which modules are replaced, and by what.

    Args:
        prefixes: how a text-only model renames what it is given.
    """

    def __init__(self, config: Mapping[str, Any], prefixes: Mapping[str, str]) -> None:
        self.fp8 = config.get("quant_method") == "fp8"
        listed = config.get("modules_to_not_convert")
        if listed is None and self.fp8:
            listed = config.get("ignored_layers")
        self.spare_head = listed is None or not self.fp8
        self.kept = [renamed(f"{name}.", prefixes).removesuffix(".") if self.fp8 else name for name in listed or ()]
        self.built = _fp8(config) if self.fp8 else awq(int(config.get("bits", 4)), int(config.get("group_size", 128)))

    def scheme(self, module: Module) -> Stored | None:
        if (module.kind == "head" and self.spare_head) or (module.kind == "experts" and not self.fp8):
            return None
        return None if any(self._means(module.asked, entry) for entry in self.kept) else self.built

    @staticmethod
    def _means(name: str, entry: str) -> bool:
        pattern: re.Pattern[str] = expression(f"(?:{entry}){BOUNDARY}", "modules_to_not_convert")
        return bool(pattern.match(name)) or name.endswith(entry)


def _fp8(config: Mapping[str, Any]) -> Stored:
    block = config.get("weight_block_size", (128, 128))
    static = "activation_scale" if config.get("activation_scheme") == "static" else ""
    return block_fp8((int(block[0]), int(block[1])), strict_rows=False) if block else tensor_fp8("weight_scale_inv", static)
