"""Releases in formats of other writers, good ones and such as are broken in the field; see `cases` for how they are made."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.recipe import parse_recipe
from qwench.run import run_recipe
from tests.loading import eight_bits
from tests.support import others
from tests.support.others import Config, Tensors

BLOCK = {"dense": 128, "moe": 64}
"""Rows and columns of a block: those of the demo checkpoints are multiples of these."""
KEPT = ("linear_attn.in_proj_a", "linear_attn.in_proj_b", "shared_expert_gate", "visual", "model.visual", "mtp", "lm_head")
"""What AWQ files of this family leave alone. The tower twice: vLLM knows it as `visual`, transformers wants a name from its beginning."""


def base(home: Path, model: str, kind: str) -> Path:
    """A release of a demo checkpoint in a format, made once in `home`: see `KINDS`."""
    out = home / f"{model}-{kind}"
    return out if out.exists() else KINDS[kind](model, out)


def _made(
    write: Callable[[str, Tensor], Tensors], config: Callable[[list[str], list[str]], Config], **more: Any
) -> Callable[[str, Path], Path]:
    return lambda model, out: others.quantize(checkpoint(model), out, write, config, **more)


def text_only(model: str, home: Path) -> Path:
    """A demo checkpoint without its tower, under the names of the text-only class; made once in `home`."""
    out = home / f"{model}-text-only"
    if not out.exists():
        recipe = parse_recipe("name: t\nsteps:\n  - export: {layout: text}\n", "t")
        run_recipe(recipe, str(checkpoint(model)), out, 1, Report("t", "bytes", None), accept_any=True)
    return out


def _fp8(head: bool, also: Callable[[str], bool] = lambda module: False) -> Callable[[str, Path], Path]:
    return lambda model, out: others.quantize(
        checkpoint(model), out, others.fp8_block(BLOCK[model]), others.fp8_config(BLOCK[model]), head, also
    )


def _shared(module: str, weight: Tensor) -> Tensors:
    """NVFP4 with one outer scale for everything, and so for what engines join."""
    return others.nvfp4(module, weight, 0.0004)


def _mixed(model: str, out: Path) -> Path:
    """FP8 attention, NVFP4 elsewhere."""

    def write(module: str, weight: Tensor) -> Tensors:
        return others.fp8_tensor(module, weight) if "self_attn" in module else others.nvfp4(module, weight, 0.0004)

    def config(quantized: list[str], kept: list[str]) -> Config:
        layers = {
            m: {"quant_algo": "FP8"} if "self_attn" in m else {"quant_algo": "NVFP4", "group_size": 16} for m in quantized
        }
        return others.modelopt_config("MIXED_PRECISION", quantized_layers=layers, kv_cache_scheme=None)(quantized, kept)

    return others.quantize(checkpoint(model), out, write, config)


def _sidecar(model: str, out: Path) -> Path:
    """NVFP4 with everything that is said of it in hf_quant_config.json."""
    return to_sidecar(base(out.parent, model, "nvfp4"), out)


def to_sidecar(source: Path, out: Path) -> Path:
    """A copy of a ModelOpt release in its older form."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    said = config.pop("quantization_config")
    nested = {
        "quant_algo": said["quant_algo"],
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": said["ignore"],
    }
    (out / "hf_quant_config.json").write_text(json.dumps({"producer": said["producer"], "quantization": nested}))
    (out / "config.json").write_text(json.dumps(config))
    return out


def _weight_only(module: str, weight: Tensor) -> Tensors:
    return others.nvfp4(module, weight, 0.0004, inputs=False)


def _static_fp8(module: str, weight: Tensor) -> Tensors:
    return others.fp8_tensor(module, weight)


STATIC: Callable[[list[str], list[str]], Config] = lambda quantized, kept: {  # noqa: E731
    "activation_scheme": "static", "quant_method": "fp8", "ignored_layers": others.listed(kept),
}  # fmt: skip
LAYER_3 = r"layers\.3\.self_attn\.[qkv]_proj"
AB = re.compile(r"linear_attn\.in_proj_[ab]$")
KINDS: dict[str, Callable[[str, Path], Path]] = {
    "fp8": _fp8(head=False),
    "fp8-head": _fp8(head=True),
    "fp8-ba": _fp8(head=False, also=lambda module: AB.search(module) is not None),
    "fp8-tower": _fp8(head=False, also=lambda module: re.search(r"visual\.blocks\.\d+\.mlp", module) is not None),
    "fp8-text": lambda model, out: others.quantize(text_only(model, out.parent), out, others.fp8_block(BLOCK[model]), others.fp8_config(BLOCK[model]), head=True),
    "fp8-text-kept": lambda model, out: others.quantize(
        text_only(model, out.parent), out, others.fp8_block(BLOCK[model]), others.fp8_config(BLOCK[model]), head=True, but=r"^model\.layers\.0\.mlp\.down_proj"
    ),
    "fp8-static": _made(_static_fp8, STATIC),
    "awq": _made(others.awq(128), others.awq_config(128, *KEPT)),
    "awq-kept": _made(others.awq(128), others.awq_config(128, *KEPT, *(f"model.language_model.layers.3.self_attn.{p}_proj" for p in "qkv")), but=LAYER_3),
    "awq-head": _made(others.awq(128), others.awq_config(128, *(e for e in KEPT if e != "mtp"), "mtp.fc"), head=True),
    "modelopt-fp8": _made(_static_fp8, others.modelopt_config("FP8")),
    "nvfp4": _made(_shared, others.modelopt_config("NVFP4")),
    "nvfp4-kept": _made(_shared, others.modelopt_config("NVFP4"), but=LAYER_3),
    "nvfp4-own": _made(others.nvfp4, others.modelopt_config("NVFP4")),
    "nvfp4-head": _made(_shared, others.modelopt_config("NVFP4"), head=True),
    "nvfp4-a16": _made(_weight_only, others.modelopt_config("W4A16_NVFP4")),
    "nvfp4-groups": _made(
        _weight_only, others.modelopt_config("NVFP4", config_groups={"group_0": {"input_activations": None, "weights": {"group_size": 16}}}),
    ),
    "nvfp4-sidecar": _sidecar,
    "mixed": _mixed,
    **eight_bits.KINDS,
    "bnb": _made(others.bitsandbytes, lambda quantized, kept: {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
}  # fmt: skip

Change = Callable[[Config], None]
Edit = Callable[[Tensors], None]


def _without(*parts: str, key: str = "modules_to_not_convert") -> Change:
    """A list without the entries that hold any of these."""

    def change(said: Config) -> None:
        said[key] = [entry for entry in said[key] if not any(part in entry for part in parts)]

    return change


def _plus(*entries: str, key: str = "modules_to_not_convert") -> Change:
    return lambda said: said.update({key: [*said[key], *entries]})


def _only(*entries: str, key: str = "modules_to_not_convert") -> Change:
    return lambda said: said.update({key: list(entries)})


def _short(said: Config) -> None:
    """Excluded modules of the trunk without the `language_model.` that the checkpoint's names have."""
    said["ignore"] = [entry.replace("model.language_model.", "model.") for entry in said["ignore"]]


def _plain_q(tensors: Tensors) -> None:
    """One member of a joined module as the source has it."""
    stem = "model.language_model.layers.3.self_attn.q_proj"
    source = next(
        held[f"{stem}.weight"]
        for path in checkpoint("dense").glob("*.safetensors")
        if f"{stem}.weight" in (held := load_file(path))
    )
    for name in [n for n in tensors if n.startswith(f"{stem}.")]:
        del tensors[name]
    tensors[f"{stem}.weight"] = source


def _gone(end: str) -> Edit:
    def edit(tensors: Tensors) -> None:
        (name,) = [n for n in tensors if n.endswith(end)]
        del tensors[name]

    return edit


def _a_log_in_fp8(tensors: Tensors) -> None:
    """Converted with everything else of its layer."""
    for name in [n for n in tensors if n.endswith("linear_attn.A_log")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def _fused_scales(tensors: Tensors) -> None:
    """Experts as transformers saves them: one tensor of all, and one of all their scales."""
    stems = sorted(
        {n.partition(".experts.")[0] + ".experts" for n in tensors if ".experts.0." in n and "weight_scale_inv" in n}
    )
    for stem in stems:
        count = len([n for n in tensors if n.startswith(f"{stem}.") and n.endswith(".up_proj.weight")])
        for last, name in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            one = {p: [tensors.pop(f"{stem}.{i}.{p}_proj.{last}") for i in range(count)] for p in ("gate", "up", "down")}
            both = [
                torch.cat([g.view(torch.uint8), u.view(torch.uint8)]).view(g.dtype)
                for g, u in zip(one["gate"], one["up"], strict=True)
            ]
            tensors[f"{stem}.gate_up_proj{name}"] = torch.stack(both)
            tensors[f"{stem}.down_proj{name}"] = torch.stack(one["down"])


def _cache_scales(tensors: Tensors) -> None:
    """Scales of a quantized cache, beside the projections."""
    for part in "kv":
        tensors[f"model.language_model.layers.3.self_attn.{part}_proj.{part}_scale"] = torch.tensor(0.05)


def _both(*changes: Change) -> Change:
    def change(said: Config) -> None:
        for one in changes:
            one(said)

    return change


FINE = ("", "", "", "")
OTHERS: dict[str, tuple[str, str, Change | None, Edit | None, tuple[str, str, str, str]]] = {
    "good dense fp8": ("dense", "fp8", None, None, FINE),
    "good moe fp8": ("moe", "fp8", None, None, FINE),
    "good dense fp8 with its head": ("dense", "fp8-head", None, None, FINE),
    "good moe fp8 with its head": ("moe", "fp8-head", None, None, FINE),
    "good moe fp8, experts fused": ("moe", "fp8", None, _fused_scales, FINE),
    "good moe fp8, text only": ("moe", "fp8-text", None, None, FINE),
    "fp8: layer 0 kept in part beside a quantized head": ("dense", "fp8-text-kept", None, None, ("", "wrong", "wrong", "")),
    "good dense fp8, one scale": ("dense", "fp8-static", None, None, ("", "", "", "random")),
    "fp8: head's names missing from the list": ("dense", "fp8", _without("mtp."), None, ("random", "random", "random", "")),
    "fp8: head's experts missing from the list": ("moe", "fp8", _without("mtp.layers.0.mlp.experts"), None, ("random", "random", "random", "")),
    "fp8: half of a joined module in the list": ("dense", "fp8", _plus("model.language_model.layers.1.mlp.gate_proj"), None, ("refuses", "refuses", "refuses", "wrong")),
    "fp8: one member stored unquantized": ("dense", "fp8", None, _plain_q, ("random", "random", "random", "random")),
    "fp8: parts of names in the list": ("dense", "fp8", _both(_without("in_proj_a", "in_proj_b"), _plus("in_proj_a", "in_proj_b")), None, ("random", "", "", "")),
    "fp8: in_proj_a and b quantized": ("dense", "fp8-ba", None, None, ("refuses", "refuses", "refuses", "")),
    "fp8: tower quantized": ("dense", "fp8-tower", None, None, ("", "wrong", "wrong", "")),
    "fp8: A_log converted": ("dense", "fp8", None, _a_log_in_fp8, ("wrong", "wrong", "wrong", "wrong")),
    "fp8: a scale is missing": ("dense", "fp8", None, _gone("layers.3.self_attn.k_proj.weight_scale_inv"), ("random", "random", "random", "random")),
    "good dense awq": ("dense", "awq", None, None, FINE),
    "good moe awq": ("moe", "awq", None, None, ("", "", "", "random")),
    "good dense awq with its head": ("dense", "awq-head", None, None, FINE),
    "awq: head missing from the list": ("dense", "awq", _without("mtp"), None, ("refuses", "random", "random", "")),
    "awq: no list": ("dense", "awq", _only(), None, ("refuses", "random", "random", "random")),
    "awq: the tower by a part of its names": ("dense", "awq", _without("model.visual"), None, ("", "", "", "random")),
    "awq: the tower by its full name": ("dense", "awq", _both(_without("visual"), _plus("model.visual")), None, ("refuses", "", "", "")),
    "awq: a part of too many names": ("dense", "awq", _plus("gate"), None, ("refuses", "random", "random", "")),
    "awq: a joined module listed by its members": ("dense", "awq-kept", None, None, ("", "random", "random", "")),
    "good dense modelopt fp8": ("dense", "modelopt-fp8", None, None, ("", "", "", "wrong")),
    "good moe modelopt fp8": ("moe", "modelopt-fp8", None, None, ("", "", "", "wrong")),
    "good dense nvfp4": ("dense", "nvfp4", None, None, ("", "", "", "refuses")),
    "good moe nvfp4": ("moe", "nvfp4", None, None, ("", "", "", "refuses")),
    "good dense nvfp4, cache scales": ("dense", "nvfp4", None, _cache_scales, ("", "", "", "refuses")),
    "good dense nvfp4 a16": ("dense", "nvfp4-a16", None, None, ("", "", "", "refuses")),
    "good moe nvfp4 a16": ("moe", "nvfp4-a16", None, None, ("", "", "", "refuses")),
    "nvfp4 without input scales": ("dense", "nvfp4-groups", None, None, ("", "random", "random", "refuses")),
    "good dense nvfp4, its own file": ("dense", "nvfp4-sidecar", None, None, ("", "", "", "refuses")),
    "nvfp4 with its head": ("dense", "nvfp4-head", None, None, ("", "refuses", "refuses", "refuses")),
    "nvfp4: head missing from the list": ("dense", "nvfp4", _without("mtp", key="ignore"), None, ("refuses", "", "", "refuses")),
    "good dense nvfp4, attention kept": ("dense", "nvfp4-kept", None, None, ("", "", "", "refuses")),
    "nvfp4: names without language_model": ("dense", "nvfp4-kept", _short, None, ("refuses", "refuses", "refuses", "refuses")),
    "nvfp4: outer scales differ": ("dense", "nvfp4-own", None, None, ("wrong", "wrong", "wrong", "refuses")),
    "nvfp4: layer 1 excluded by a wildcard": ("dense", "nvfp4", _plus("model.language_model.layers.1*", key="ignore"), None, ("refuses", "refuses", "refuses", "refuses")),
    "modelopt fp8: head missing from the list": ("dense", "modelopt-fp8", _without("mtp", key="ignore"), None, ("random", "random", "random", "wrong")),
    "good dense mixed": ("dense", "mixed", None, None, ("", "", "", "refuses")),
    "good moe mixed": ("moe", "mixed", None, None, ("", "", "", "refuses")),
    **eight_bits.CASES,
    "bitsandbytes": ("dense", "bnb", None, None, ("refuses", "unknown", "unknown", "unknown")),
}  # fmt: skip
"""Model, format, change of the quantization_config, change of the tensors; and the worst that happens in vLLM, SGLang 0.5.23, SGLang 0.5.19, transformers."""


def make(home: Path, name: str) -> Path:
    """The folder of a case."""
    model, kind, config, tensors, _ = OTHERS[name]
    source = base(home, model, kind)
    if config is None and tensors is None:
        return source
    out = home / re.sub(r"\W+", "-", name)
    if not out.exists():
        out.mkdir()
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name != "config.json":
                (out / path.name).symlink_to(path.resolve())
        said = json.loads((source / "config.json").read_text())
        if config:
            config(said["quantization_config"])
        (out / "config.json").write_text(json.dumps(said))
        if tensors:
            held = load_file(source / "model.safetensors")
            tensors(held)
            save_file({n: t.contiguous() for n, t in held.items()}, out / "model.safetensors", metadata={"format": "pt"})
        else:
            (out / "model.safetensors").symlink_to((source / "model.safetensors").resolve())
    return out
