"""What ModelOpt says of a file, in the two forms that it has had, and where engines look for it.

Newer releases have it as `quantization_config` in config.json (`quant_algo`, `ignore`, `quantized_layers`); older ones in a file of its own, `hf_quant_config.json`, under `quantization` (`quant_algo`,
`exclude_modules`). Engines read config.json first, and the other file where config.json says nothing, or says MIXED_PRECISION and leaves the list of layers out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwench.checkpoint.source import StoredSource
from qwench.errors import CheckpointError
from qwench.loading.reconfigured import Reconfigured

SIDECAR = "hf_quant_config.json"
METHODS = ("modelopt", "modelopt_fp4", "modelopt_fp8", "modelopt_mixed", "modelopt_mxfp8")
"""What `quant_method` may be; engines look at `quant_algo`."""
MIXED = "MIXED_PRECISION"
FP4 = ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ")
FROM_SIDECAR = "from hf_quant_config.json"
"""A key that only we write, into a quantization_config that is not config.json's."""


@dataclass(frozen=True)
class ModelOpt:
    """A quantization by ModelOpt.

    Attributes:
        algo: `quant_algo`, in capitals.
        exclude: names and wildcards of what is not quantized.
        group: columns that share a scale; None where nothing is said.
        layers: module -> its algorithm in capitals, of a mixed one.
        sidecar: whether it is the older form, from a file of its own.
        missing: keys that the older form lacks and vLLM asks for.
        inputs: whether some group rounds its inputs; None where no groups are listed.
    """

    algo: str
    exclude: tuple[str, ...]
    group: int | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    sidecar: bool = False
    missing: tuple[str, ...] = ()
    inputs: bool | None = None


def read_modelopt(config: Mapping[str, Any]) -> ModelOpt:
    """A quantization_config of ModelOpt in either form. Raises CheckpointError where it is none."""
    nested = config.get("quantization")
    said: Mapping[str, Any] = nested if isinstance(nested, Mapping) else config
    exclude = said.get("exclude_modules" if isinstance(nested, Mapping) else "ignore") or []
    layers, group, groups = said.get("quantized_layers") or {}, said.get("group_size"), said.get("config_groups") or {}
    if not isinstance(exclude, list) or not isinstance(layers, Mapping) or not said.get("quant_algo"):
        what = f"ModelOpt's configuration has quant_algo {said.get('quant_algo')!r} and a list of excluded modules that is a {type(exclude).__name__}"
        raise CheckpointError(what, "ask who made the file")
    return ModelOpt(
        algo=str(said["quant_algo"]).upper(),
        exclude=tuple(map(str, exclude)),
        group=int(group) if group is not None else None,
        layers={name: str(told.get("quant_algo", "")).upper() for name, told in layers.items()},
        sidecar=FROM_SIDECAR in config,
        missing=tuple(key for key in ("group_size", "kv_cache_quant_algo", "exclude_modules") if key not in said),
        inputs=any(g.get("input_activations") for g in groups.values()) if groups else None,
    )


def effective(source: StoredSource) -> StoredSource:
    """The source with the quantization_config that engines find: config.json's, else that of `hf_quant_config.json`. Raises CheckpointError."""
    own = source.config.get("quantization_config")
    listless = own and own.get("quant_algo") == MIXED and not own.get("quantized_layers")
    path = source.folder / SIDECAR
    if (own and not listless) or not path.is_file():
        return source
    said = _read(path)
    if own:
        added = {key: value for key, value in (said.get("quantization") or {}).items() if key == "quantized_layers"}
        return Reconfigured(source, source.config | {"quantization_config": own | added})
    return Reconfigured(
        source, source.config | {"quantization_config": {**said, "quant_method": "modelopt", FROM_SIDECAR: True}}
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "fetch it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object", "fetch it again")
    return found
