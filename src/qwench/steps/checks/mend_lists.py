"""The list of what is not quantized, rewritten from what the files hold, for formats of other writers: FP8 and AWQ (`modules_to_not_convert`), ModelOpt (`ignore`, `exclude_modules`).

Every engine reads such a list in its own way (`qwench.loading.vllm_others`, `sglang_others`, `transformers_others`); full names of modules, one by one, mean the same to all of them, with two additions:

- a layer's experts by the name of the module that holds them, since engines ask for the layer and not for an expert;
- in AWQ lists what engines join also by its joined name, the only one that SGLang asks for there.

Routers are left out: engines leave them alone, and AWQ lists are searched for parts of names, of which `mlp.gate` is one of `mlp.gate_up_proj`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from qwench.checkpoint.source import StoredSource, TensorEntry
from qwench.formats.matching import FUSED
from qwench.loading import modelopt
from qwench.loading.network import EXPERT, decoder_claims, head_claims, tower_claims
from qwench.loading.reading import method_of
from qwench.models.claims import Claim

Config = dict[str, Any]
SCALES = ("weight_scale_inv", "weight_scale", "qweight")
"""Last names of tensors that only a quantized module has."""
ROUTER = "mlp.gate"


def full_list(source: StoredSource) -> Config | None:
    """The config with the list rewritten; None where it has no such list, or no module is quantized."""
    method = method_of(source.config)
    if method not in ("fp8", "awq", *modelopt.METHODS):
        return None
    quantized, kept = stored_modules(source)
    if not quantized:
        return None
    names = entries(kept, joined=method == "awq")
    config = copy.deepcopy(source.config)
    said = config["quantization_config"]
    if method in ("fp8", "awq"):
        for key in [key for key in ("ignored_layers", "modules_to_not_convert") if key in said] or ["modules_to_not_convert"]:
            said[key] = names
        return config
    nested = isinstance(said.get("quantization"), Mapping)
    inner = said["quantization"] if nested else said
    inner["exclude_modules" if nested else "ignore"] = names
    if layers := inner.get("quantized_layers"):
        inner["quantized_layers"] = {name: told for name, told in layers.items() if name not in kept}
    return config


def stored_modules(source: StoredSource) -> tuple[set[str], list[str]]:
    """Linear modules that are stored quantized, and those that are stored as they are; experts one by one."""
    quantized, kept = set[str](), list[str]()
    for claim in linear_claims(source.config):
        module = claim.tensor.removesuffix(".weight")
        if any(f"{module}.{scale}" in source.tensors for scale in SCALES):
            quantized.add(module)
        elif claim.tensor in source.tensors or in_fused(module, source.tensors):
            kept.append(module)
    return quantized, kept


def entries(kept: Iterable[str], joined: bool) -> list[str]:
    """The names of a list. `joined`: with the names of what engines join."""
    names: dict[str, None] = {}
    for module in kept:
        expert = EXPERT.match(module)
        if not module.endswith(ROUTER):
            names[expert["stem"] if expert else module] = None
    return [*names, *(_joined(names) if joined else ())]


def _joined(names: Collection[str]) -> list[str]:
    """What engines join, where all of its members are in the list."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [
        f"{parent}.{fused}"
        for parent in parents
        for fused, members in FUSED.items()
        if all(f"{parent}.{member}" in names for member in members)
    ]


def linear_claims(config: Config) -> list[Claim]:
    """Every matrix, experts one by one, of trunk, head and tower under either prefix."""
    prefixes = ("model.language_model.", "model.")
    claims = [
        *(c for prefix in prefixes for c in decoder_claims(config, prefix)),
        *head_claims(config, 1),
        *tower_claims(config),
    ]
    return [claim for claim in {c.tensor: c for c in claims}.values() if claim.slots[0].linear]


def in_fused(module: str, tensors: Mapping[str, TensorEntry]) -> bool:
    """Whether an expert's weight is stored in one tensor with all others, and without scales."""
    found = EXPERT.match(module)
    if found is None:
        return False
    fused = f"{found['stem']}.{'down_proj' if found['leaf'] == 'down_proj' else 'gate_up_proj'}"
    return fused in tensors and f"{fused}_scale_inv" not in tensors
