"""The export step that makes GGUF files, for llama.cpp and all that stands on it; what they are: docs/gguf.md.

- export:
    format: gguf
    types: [BF16, Q8_0, Q6_K, Q4_K_M]
    mmproj: BF16
    overrides:
      - {roles: [mtp.*], type: Q8_0}
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qwench.recipe.rules import Strict

GGUF_TAG, TENSORS_TAG = "as-gguf", "as-safetensors"
"""What tells the two kinds of export apart inside pydantic; they appear in no message."""


class TypeOverride(Strict):
    """A type for some roles, whatever a file's mix says; of several that name a tensor the last wins.

    Attributes:
        roles: globs over roles, as in `Rule`.
        type: of the tensors: `Q8_0`, `BF16`, `Q4_K` ...
    """

    roles: tuple[str, ...] = Field(min_length=1)
    type: str


class ExportGguf(Strict):
    """GGUF files: one for each type and content, and one for the tower.

    Attributes:
        types: file types, by llama.cpp's names; a plan refuses unknown ones.
        mmproj: what the tower's file is stored in; `none` makes no such file.
        content: `model`: text with its MTP head. `trunk-only`: without the head. `mtp-only`: the head as a draft file.
        overrides: types for roles, in every quantized file of text.
        importance: weigh input channels by their mean squares when scales are chosen. `true`: observed on calibration rows, MTP head included. The path of
            a file: what `llama-imatrix` or an earlier run of ours observed. Either way it rides along as imatrix.gguf.
    """

    format: Literal["gguf"]
    types: tuple[str, ...] = Field(("BF16", "Q8_0", "Q6_K", "Q4_K_M"), min_length=1)
    mmproj: Literal["BF16", "F16", "F32", "Q8_0", "none"] = "BF16"
    content: tuple[Literal["model", "trunk-only", "mtp-only"], ...] = Field(("model",), min_length=1)
    overrides: tuple[TypeOverride, ...] = ()
    importance: bool | str = False

    @field_validator("types", "content")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is named twice: every file is made once")
        return value

    @model_validator(mode="before")
    @classmethod
    def _no_shards(cls, data: Any) -> Any:
        for key in ("shard_size", "dtype", "files"):
            if isinstance(data, dict) and key in data:
                raise ValueError(
                    f"{key} belongs to safetensors releases: a GGUF file is one file, its types are `types` and `overrides`"
                )
        return data


def export_tag(value: Any) -> str:
    """Which kind of export a mapping or a model is; a slip of the pen such as `ggfu` counts as gguf, so that the complaint names it."""
    stated = value.get("format") if isinstance(value, dict) else getattr(value, "format", None)
    return GGUF_TAG if difflib.get_close_matches(str(stated), ["gguf"]) else TENSORS_TAG
