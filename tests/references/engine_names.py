"""How the engines decide from a quantization_config what a module is: their documented rules, written down one by one.

Runtime names are what the engines call the modules of a Qwen3.5; fused ones are asked member by member unless the fused name itself is
found. Rules were read in vLLM 0.32 and in SGLang of autumn 2026; transformers uses the compressed-tensors library itself, which tests call
directly.
"""

from __future__ import annotations

import re
from typing import Any

FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
}
RENAMED = {"model.visual.": "visual.", "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}

Answer = int | None
"""The number of the config group, or None: not quantized."""


def runtime_name(module: str) -> str:
    """vLLM's name of a module of a conditional-generation checkpoint."""
    for old, new in RENAMED.items():
        if (module + ".").startswith(old):
            return (new + (module + ".").removeprefix(old)).removesuffix(".")
    return module


def fused_name(module: str) -> str:
    """The name of what a module is fused into, or its own."""
    parent, _, leaf = module.rpartition(".")
    for fused, members in FUSED.items():
        if leaf in members and ".experts." not in module:
            return f"{parent}.{fused}"
    return module


def _groups(config: dict[str, Any]) -> dict[str, int]:
    return {target: i for i, group in enumerate(config["config_groups"].values()) for target in group["targets"]}


def _found(name: str, entries: list[str], contained: bool = False) -> str | None:
    for entry in entries:
        if entry.startswith("re:"):
            if re.match(entry[3:], name):
                return entry
        elif entry == name or (contained and entry.lower() in name.lower()):
            return entry
    return None


def vllm(config: dict[str, Any], module: str, conditional: bool = True) -> Answer:
    """vLLM: exact names are renamed (and those of the MTP head dropped by the main model), patterns are not. An expert stands for its layer."""

    def renamed(entries: list[str]) -> list[str]:
        kept = [e for e in entries if e.startswith("re:") or not e.startswith("mtp.")]
        return [e if e.startswith("re:") or "." not in e else rename(e) for e in kept]

    rename = runtime_name if conditional else (lambda m: m)
    name = re.sub(r"\.experts\.\d+\.", ".experts.0.", rename(module))
    fused = fused_name(name)
    members = [name] if fused == name else [f"{fused.rpartition('.')[0]}.{m}" for m in FUSED[fused.rpartition(".")[2]]]
    ignore = renamed(config["ignore"])
    if _found(fused, ignore):
        return None
    ignored = [_found(m, ignore) is not None for m in members]
    assert all(ignored) or not any(ignored), f"vLLM refuses {fused}: its members differ"
    if all(ignored):
        return None
    groups = _groups(config)
    targets = renamed(list(groups))
    hit = _found(fused, targets)
    if hit is None:
        hits = [_found(m, targets) for m in members]
        hit = hits[0] if all(hits) else None
    if hit is None and not module.endswith("lm_head"):  # the head is no linear layer there
        hit = "Linear" if "Linear" in groups else None
    return None if hit is None else groups[hit]


def sglang(config: dict[str, Any], module: str) -> Answer:
    """SGLang: exact names by containment; the class goes before the members of a fused module; the MTP head knows fused names only."""
    name = module.replace("model.language_model.", "model.")
    fused = fused_name(name)
    members = (
        [fused]
        if fused == name or name.startswith("mtp.")
        else [f"{fused.rpartition('.')[0]}.{m}" for m in FUSED[fused.rpartition(".")[2]]]
    )
    groups = _groups(config)
    if ".experts." in name:
        return None if _found(name.partition(".experts.")[0] + ".experts", config["ignore"], True) else groups["Linear"]
    ignored = [_found(m, config["ignore"], True) is not None for m in members]
    assert all(ignored) or not any(ignored), f"SGLang refuses {fused}: its members differ"
    if all(ignored):
        return None
    hit = _found(fused, list(groups)) or ("Linear" if "Linear" in groups else None)
    if hit is None:
        hits = [_found(m, list(groups)) for m in members]
        hit = hits[0] if all(hits) else None
    assert hit is not None, f"SGLang refuses {fused}: neither ignored nor targeted"
    return groups[hit]
