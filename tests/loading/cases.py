"""Releases of the demo checkpoints, and copies of them that are broken as they are in the field.

Tensors are linked where only the config changes. Every case is a function of a folder of releases and a new folder, so that a test makes only what it needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.formats import compressed_tensors
from qwench.methods.rtn import round_to_nearest
from qwench.numerics import SCHEMES
from qwench.recipe import load_recipe, parse_recipe
from qwench.run import run_recipe

Config = dict[str, Any]
LINEAR = "mlp.*, expert.*, shared.*, attention.*, delta.qkv, delta.z, delta.out"
RULES = {
    "gptq": ("gptq", f"{{roles: [{LINEAR}], scheme: int4}}"),
    "gptq8": ("gptq", f"{{roles: [{LINEAR}], scheme: int4}}, {{roles: [attention.*], scheme: int8}}"),
    "auto-round": ("auto-round", f"{{roles: [{LINEAR}], scheme: int4}}"),
    "fp8": ("compressed-tensors", f"{{roles: [{LINEAR}], scheme: fp8}}"),
    "fp8-block": ("compressed-tensors", f"{{roles: [{LINEAR}], scheme: fp8-block}}"),
    "fp8-w8a8": ("compressed-tensors", f"{{roles: [{LINEAR}], scheme: fp8-w8a8}}"),
    "text": ("compressed-tensors, layout: text", f"{{roles: [{LINEAR}], scheme: int4}}"),
    "kept": ("compressed-tensors", f'{{roles: [{LINEAR}], scheme: int4}}, {{roles: [{LINEAR}], layers: "1", scheme: keep}}'),
}
"""Recipes by name: container and rules. `gptq8` has INT8 attention, `text` is text-only, `kept` leaves layer 1 alone."""


CALIBRATED = "name: t\nacceptance: off\ncalibration: {samples: 4, length: 64}\nsteps:\n"
WHOLE = {
    "pruned": f"{CALIBRATED}  - prune: {{ratio: 0.5}}\n  - export\n",
    "w4a4": f"{CALIBRATED}  - quantize:\n      rules: [{{roles: [{LINEAR}], scheme: nvfp4-w4a4}}]\n  - export\n",
}
"""Recipes that look at text: half of the experts, the head's with the trunk's; NVFP4 with 4-bit inputs."""


def release(home: Path, model: str, recipe: str) -> Path:
    """A release of a demo checkpoint (`dense`, `moe`), made once in `home`. `recipe`: a bundled one, or the name of a container; `bf16` is the demo itself."""
    if recipe == "bf16":
        return checkpoint(model)
    out = home / f"{model}-{recipe}"
    if not out.exists():
        container, rules = RULES.get(recipe, ("", ""))
        text = (
            WHOLE.get(recipe)
            or f"name: t\nsteps:\n  - quantize:\n      rules: [{rules}]\n  - export: {{format: {container}}}\n"
        )
        made = parse_recipe(text, "t") if rules or recipe in WHOLE else load_recipe(recipe)
        run_recipe(made, str(checkpoint(model)), out, 1, Report("t", "bytes", None), accept_any=True)
    return out


def split(folder: Path) -> Path:
    """Move the head into a second file beside `model.safetensors`, with an index of both, and nothing in config.json that says so."""
    held = load_file(folder / "model.safetensors")
    parts = {
        "model.safetensors": {n: t for n, t in held.items() if "layers.7." not in n},
        "more.safetensors": {n: t for n, t in held.items() if "layers.7." in n},
    }
    for name, tensors in parts.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, tensors in parts.items() for n in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def SPLIT(tensors: dict[str, Tensor]) -> None:
    """Stands for `split`, which changes files and no tensors."""


def variant(
    source: Path,
    out: Path,
    config: Callable[[Config], None] | None = None,
    tensors: Callable[[dict[str, Tensor]], None] | None = None,
) -> Path:
    """A copy of a folder with another config, or with other tensors."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".safetensors" and tensors:
            continue
        if path.is_file() and not (tensors and path.name.endswith("index.json")):
            (out / path.name).symlink_to(path.resolve())
    if tensors:
        held = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
        tensors(held)
        save_file(
            {name: tensor.contiguous() for name, tensor in held.items()}, out / "model.safetensors", metadata={"format": "pt"}
        )
    if config:
        edit(out, config)
    return out


def edit(folder: Path, change: Callable[[Config], None]) -> Path:
    """Change a folder's config.json, and quantize_config.json with it."""
    found: Config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(found)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return folder


def moved(old: str, new: str | None) -> Callable[[dict[str, Tensor]], None]:
    """Rename the one tensor whose name ends so, or drop it."""

    def change(tensors: dict[str, Tensor]) -> None:
        (name,) = [n for n in tensors if n.endswith(old)]
        tensor = tensors.pop(name)
        if new is not None:
            tensors[name.removesuffix(old) + new] = tensor

    return change


def _q(change: Callable[[Config], None]) -> Callable[[Config], None]:
    return lambda config: change(config["quantization_config"])


def _ignoring(*entries: str, keep: str = "") -> Callable[[Config], None]:
    """Another `ignore`: what it had and holds `keep`, and these entries."""

    def change(quantization: Config) -> None:
        quantization["ignore"] = [
            e for e in quantization["ignore"] if "mtp" not in e.replace("(?!mtp", "") or (keep and keep in e)
        ] + list(entries)

    return _q(change)


SHARDS = [f"mtp.layers.0.self_attn.{p}_proj" for p in "qkvo"] + [f"mtp.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")]


def _prune_trunk(tensors: dict[str, Tensor], kept: int = 8) -> None:
    for name in list(tensors):
        if name.startswith("mtp.") or ".mlp." not in name:
            continue
        if name.endswith((".mlp.gate.weight", "experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensors[name][:kept].clone()


def _one_global_off(tensors: dict[str, Tensor]) -> None:
    (name,) = [n for n in tensors if n.endswith("layers.3.self_attn.k_proj.weight_global_scale")]
    tensors[name] = tensors[name] * 2


def _last_global_of_an_expert_off(tensors: dict[str, Tensor]) -> None:
    (name,) = [n for n in tensors if n.endswith("layers.1.mlp.experts.5.up_proj.weight_global_scale")]
    tensors[name] = tensors[name] * 0.5


def _text(**changes: Any) -> Callable[[Config], None]:
    return lambda config: config["text_config"].update(changes)


def _extra_expert(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if n.startswith("mtp.layers.0.mlp.experts.11.")]:
        tensors[name.replace("experts.11.", "experts.12.")] = tensors[name].clone()


def _fc_packed(tensors: dict[str, Tensor]) -> None:
    """The head's first layer in INT4, as a target that reaches it writes it."""
    weight = tensors.pop("mtp.fc.weight")
    tensors |= compressed_tensors.pack("mtp.fc", round_to_nearest(weight.float(), SCHEMES["int4"]))


def _layer_kept(quantization: Config) -> None:
    quantization["dynamic"] = {"-:.*layers\\.1\\.mlp\\.experts.*": {}} | quantization["dynamic"]


def _fused_kept(tensors: dict[str, Tensor]) -> None:
    """Layer 1's experts as the source has them: unquantized, in one tensor."""
    stem = "model.language_model.layers.1.mlp.experts."
    source = {
        n: t for path in checkpoint("moe").glob("*.safetensors") for n, t in load_file(path).items() if n.startswith(stem)
    }
    for name in [n for n in tensors if n.startswith(stem)]:
        del tensors[name]
    tensors |= source


def _flat(config: Config) -> None:
    """The class without a tower, over the decoder's part of the config."""
    text = config.pop("text_config")
    for key in ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        config.pop(key, None)
    config.update(text)


def _causal_class(config: Config) -> None:
    was = config["architectures"][0].replace("ConditionalGeneration", "CausalLM")
    _flat(config)
    config["architectures"] = [was]


def _members_alone(quantization: Config) -> None:
    """Attention's patterns as they are written from a checkpoint's names: each projection by itself, and nothing of what is joined."""
    dynamic = quantization["dynamic"]
    (pattern,) = [key for key in dynamic if key.startswith("+:")]
    numbers = dynamic.pop(pattern)
    dynamic.update({f"+:.*self_attn\\.{p}_proj$": numbers for p in "qkvo"})


def _asym(quantization: Config) -> None:
    quantization["sym"] = False


Made = tuple[str, str, Callable[[Config], None] | None, Callable[[dict[str, Tensor]], None] | None]
"""Model, recipe, change of the config, change of the tensors."""


def _image_positions(config: Config) -> None:
    config["rope_parameters"] |= {"mrope_section": [3, 3, 2], "mrope_interleaved": True}


CASES: dict[str, Made] = {
    "good dense bf16": ("dense", "bf16", None, None),
    "good moe bf16": ("moe", "bf16", None, None),
    "good dense int4": ("dense", "int4", None, None),
    "good moe int4": ("moe", "int4", None, None),
    "good dense nvfp4a16": ("dense", "nvfp4a16", None, None),
    "good moe nvfp4a16": ("moe", "nvfp4a16", None, None),
    "good dense fp8": ("dense", "fp8", None, None),
    "good dense fp8-block": ("dense", "fp8-block", None, None),
    "good dense fp8-w8a8": ("dense", "fp8-w8a8", None, None),
    "fp8 head missing from ignore": ("dense", "fp8", _ignoring(), None),
    "good dense gptq": ("dense", "gptq", None, None),
    "good moe gptq": ("moe", "gptq", None, None),
    "good dense auto-round": ("dense", "auto-round", None, None),
    "good moe auto-round": ("moe", "auto-round", None, None),
    "good dense text": ("dense", "text", None, None),
    "good moe text": ("moe", "text", None, None),
    "text-only with image positions": ("dense", "text", _image_positions, None),
    "head's shards in ignore": ("dense", "int4", _ignoring(*SHARDS, "mtp.fc"), None),
    "fc quantized by a broad target": ("dense", "int4", _ignoring("re:^mtp\\.layers.*"), None),
    "head's experts missing from ignore": (
        "moe", "int4",
        _ignoring("mtp.fc", "re:mtp\\.layers\\.0\\.self_attn.*", "re:mtp\\.layers\\.0\\.mlp\\.shared_expert.*"), None,
    ),
    "half of a joined module in ignore": ("dense", "int4", _ignoring("re:^mtp.*", "model.language_model.layers.1.mlp.gate_proj"), None),
    "prefix-bound pattern": (
        "dense", "int4", _q(lambda q: q.update(ignore=[e.replace("(?:.*\\.)?layers", "model\\.language_model\\.layers") for e in q["ignore"]])), None,
    ),
    "a global scale is missing": ("dense", "nvfp4a16", None, moved("layers.3.self_attn.k_proj.weight_global_scale", None)),
    "a global scale differs": ("dense", "nvfp4a16", None, _one_global_off),
    "an expert's global scale differs": ("moe", "nvfp4a16", None, _last_global_of_an_expert_off),
    "a tensor has another name": ("dense", "int4", None, moved("layers.1.mlp.up_proj.weight_packed", "layers.1.mlp.up_proj.weight_pack")),
    "a norm is missing": ("dense", "int4", None, moved("language_model.layers.2.input_layernorm.weight", None)),
    "scales of one expert are missing": ("moe", "int4", None, moved("language_model.layers.2.mlp.experts.7.down_proj.weight_scale", None)),
    "unpruned head": ("moe", "bf16", _text(num_experts=8), _prune_trunk),
    "good moe pruned": ("moe", "pruned", None, None),
    "good dense nvfp4 w4a4": ("dense", "w4a4", None, None),
    "one expert too many": ("moe", "bf16", None, _extra_expert),
    "good dense gptq8": ("dense", "gptq8", None, None),
    "gptq dynamic names q alone": ("dense", "gptq8", _q(_members_alone), None),
    "good moe kept": ("moe", "kept", None, None),
    "gptq without a pattern for the head": (
        "dense", "gptq", _q(lambda q: q.update(dynamic={k: v for k, v in q["dynamic"].items() if "mtp" not in k})), None,
    ),
    "gptq moe without a pattern for the head": (
        "moe", "gptq", _q(lambda q: q.update(dynamic={k: v for k, v in q["dynamic"].items() if "mtp" not in k})), None,
    ),
    "gptq says desc_act": ("dense", "gptq", _q(lambda q: q.update(desc_act=True)), None),
    "gptq says asymmetric": ("dense", "gptq", _q(_asym), None),
    "auto-round stacks by another name": ("dense", "auto-round", _q(lambda q: q.update(block_name_to_quantize="model.layers")), None),
    "auto-round half of a joined module": (
        "dense", "auto-round", _q(lambda q: q["extra_config"].update({"model.language_model.layers.1.mlp.gate_proj": {"bits": 16}})), None,
    ),
    "fc stored quantized": ("dense", "int4", _ignoring("re:^mtp\\.layers.*"), _fc_packed),
    "kept experts fused in gptq": ("moe", "gptq", _q(_layer_kept), _fused_kept),
    "two files and none named": ("dense", "bf16", None, SPLIT),
    "a tower beside a text-only class": ("dense", "bf16", _causal_class, None),
}  # fmt: skip


def make(home: Path, name: str) -> Path:
    """The folder of a case."""
    model, recipe, config, tensors = CASES[name]
    source = release(home, model, recipe)
    if config is None and tensors is None:
        return source
    out = home / name.replace(" ", "-")
    if not out.exists():
        variant(source, out, config, tensors)
        if tensors is SPLIT:
            split(out)
    return out
