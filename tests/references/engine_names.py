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


Numbers = tuple[int, int | None]
"""Bits and columns in a group (None: a whole row)."""


def _group(size: int) -> int | None:
    return None if size == -1 else size


def _dynamic(config: dict[str, Any], name: str) -> dict[str, Any] | bool | None:
    """What GPTQModel and vLLM find in `dynamic`: False, the rule, or None where nothing matches."""
    for pattern, rule in config["dynamic"].items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), name):
                return False
        elif re.match(pattern.removeprefix("+:"), name):
            found: dict[str, Any] = rule
            return found
    return None


def gptqmodel(config: dict[str, Any], module: str) -> tuple[int, int | None, bool] | None:
    """GPTQModel 7.7: the names of the checkpoint. Bits, group, desc_act."""
    found = _dynamic(config, module)
    if found is False:
        return None
    values = config | (found if isinstance(found, dict) else {})
    return values["bits"], _group(values["group_size"]), values["desc_act"]


def vllm_gptq(config: dict[str, Any], module: str, stored: list[str], conditional: bool = True) -> Numbers | None:
    """vLLM 0.32, `AutoGPTQConfig`. `stored`: modules of the files' headers that have integer tensors; empty where they could not be read.

    Names are its own, of fused modules the fused one; of experts the module that holds them all, which the headers are not asked about.
    """
    kept_head = any(k.startswith("-:") and "mtp" in k for k in config["dynamic"])
    if module.startswith("mtp.layers.") and kept_head:
        return None
    if module.endswith("lm_head") and not config["lm_head"]:
        return None
    name = runtime_name(module) if conditional else module
    name = re.sub(r"\.experts\.\d+\..*", ".experts", fused_name(name))
    if not name.endswith(".experts") and stored:
        known = [runtime_name(m) if conditional and "." in m else m for m in stored]
        leaf = name.rpartition(".")[2]
        shards = [name.replace(leaf, member) for member in FUSED.get(leaf, [leaf])]
        quantized = [any(k in shard for k in known) for shard in shards]
        assert all(quantized) or not any(quantized), f"vLLM refuses {name}: its members differ"
        if not quantized[0]:
            return None
    found = _dynamic(config, name)
    if found is False:
        return None
    values = config | (found if isinstance(found, dict) else {})
    assert values["sym"] and values["bits"] in (4, 8)
    return values["bits"], _group(values["group_size"])


SPECIAL = set(r"*+?^$()[]{}|\\")
PACKED = {"qkv_proj": FUSED["qkv_proj"], "gate_up_proj": FUSED["gate_up_proj"], "qkv": ["qkv"]} | {
    k: FUSED[k] for k in ("in_proj_qkvz", "in_proj_ba")
}
"""vLLM's mapping of a Qwen3.5 with a tower, in its order: `qkv` is the tower's, and is a part of other names."""


def vllm_auto_round(config: dict[str, Any], module: str, conditional: bool = True) -> Numbers | None:
    """vLLM 0.32, `INCConfig`: exact names and stacks are renamed, expressions are not; expressions are searched for."""

    def renamed(key: str) -> str:
        for old, new in RENAMED.items() if conditional else ():
            if key.startswith(old):
                return new + key.removeprefix(old)
        return key

    extra = {renamed(key): values for key, values in config["extra_config"].items()}
    stacks = [renamed(name + ".").removesuffix(".") for name in config["block_name_to_quantize"].split(",")]
    name = runtime_name(module) if conditional else module
    name = re.sub(r"\.experts\.\d+\..*", ".experts", fused_name(name))

    def configured(asked: str) -> bool:
        return asked in extra or any(re.search(k, asked) for k in extra if set(k) & SPECIAL)

    def numbers(asked: str, quantized: bool = True) -> tuple[int, int, bool]:
        entry = extra.get(asked)
        if entry is None:
            entry = next((v for k, v in extra.items() if set(k) & SPECIAL and re.search(k, asked)), {})
        bits, group, sym = (config["bits"], config["group_size"], config["sym"]) if quantized else (16, -1, True)
        return entry.get("bits", bits), entry.get("group_size", group), entry.get("sym", sym)

    def resolved() -> tuple[int, int, bool]:
        if name in extra:
            return numbers(name)
        for key in extra:
            if name.endswith(f".{key}"):
                return numbers(key)
        quantized = name.startswith(tuple(stacks))
        for fused, members in PACKED.items():
            if fused in name and name.count(fused) == 1:
                parts = [name.replace(fused, member) for member in members]
                if any(configured(part) for part in parts):
                    found = {numbers(part, quantized) for part in parts}
                    assert len(found) == 1, f"vLLM refuses {name}: its members differ"
                    return found.pop()
        return numbers(name, quantized)

    bits, group, sym = resolved()
    assert sym
    return None if bits >= 16 else (bits, _group(group))


def auto_round(config: dict[str, Any], module: str, modules: list[str]) -> Numbers | None:
    """auto-round 0.16, `get_layer_config`, with the names of the checkpoint; `modules`: every linear layer of the model."""
    stacks = config["block_name_to_quantize"].split(",")
    extra = dict(config["extra_config"])
    layers = [m for m in modules if any(m.startswith(s) for s in stacks)]
    for key in [k for k in extra if k not in modules]:
        found = [m for m in layers if re.search(key, m)] or [m for m in modules if re.search(key, m)]
        for name in found:
            extra.setdefault(name, config["extra_config"][key])
    if module not in layers and module not in extra:
        return None
    values = {"bits": config["bits"], "group_size": config["group_size"]} | extra.get(module, {})
    return None if values["bits"] > 8 else (values["bits"], _group(values["group_size"]))
