"""Eight-bit releases of others in compressed-tensors, written with plain torch as that library and the tools around it store them: FP8 by row, with one scale, in blocks; INT8.

`KINDS` and `CASES` are part of those in `others`, where the folders are made. That the bytes are the library's is tested in `test_eight_bits`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwench.demo import checkpoint
from tests.support import others
from tests.support.others import Config, Tensors

BLOCK = {"dense": 128, "moe": 64}
SYMMETRIC: Config = {
    "actorder": None,
    "block_structure": None,
    "group_size": None,
    "num_bits": 8,
    "observer": None,
    "observer_kwargs": {},
    "symmetric": True,
}
TOKENS: Config = {"dynamic": True, "strategy": "token"}
ALL_TOKENS: Config = {"dynamic": False, "strategy": "tensor"}
Write = Callable[[str, Tensor], Tensors]
Made = Callable[[list[str], list[str]], Config]


def fp8_rows(module: str, weight: Tensor) -> Tensors:
    """FP8_DYNAMIC: a scale for each row."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    return {f"{module}.weight": _e4m3(weight.float() / scale.float()), f"{module}.weight_scale": scale}


def fp8_one(module: str, weight: Tensor) -> Tensors:
    """FP8: one scale for the weight, one for its inputs."""
    scale = (weight.float().abs().amax() / 448).bfloat16().reshape(1)
    codes = _e4m3(weight.float() / scale.float())
    return {
        f"{module}.weight": codes,
        f"{module}.weight_scale": scale,
        f"{module}.input_scale": torch.tensor([0.0125]).bfloat16(),
    }


def fp8_rows_static(module: str, weight: Tensor) -> Tensors:
    return fp8_rows(module, weight) | {f"{module}.input_scale": torch.tensor([0.0125]).bfloat16()}


def fp8_one_dynamic(module: str, weight: Tensor) -> Tensors:
    return {name: tensor for name, tensor in fp8_one(module, weight).items() if not name.endswith("input_scale")}


def fp8_blocks(block: int) -> Write:
    """FP8_BLOCK: a scale for each block, the last of which may be partial."""

    def write(module: str, weight: Tensor) -> Tensors:
        padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % block, 0, -weight.shape[0] % block))
        blocks = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))
        scale = (blocks.abs().amax((1, 3)).clamp(min=1e-8) / 448).bfloat16()
        codes = _e4m3(blocks / scale.float()[:, None, :, None]).reshape(padded.shape)
        return {f"{module}.weight": codes[: weight.shape[0], : weight.shape[1]], f"{module}.weight_scale": scale}

    return write


def int8_rows(module: str, weight: Tensor) -> Tensors:
    """W8A8: integers one to a byte, a scale for each row."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127.5).bfloat16()
    codes = (weight.float() / scale.float()).clamp(-128, 127).round().to(torch.int8)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale}


def int8_one(module: str, weight: Tensor) -> Tensors:
    scale = (weight.float().abs().amax() / 127.5).bfloat16().reshape(1)
    codes = (weight.float() / scale.float()).clamp(-128, 127).round().to(torch.int8)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale}


def _e4m3(values: Tensor) -> Tensor:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def said(strategy: str, inputs: Config | None, kind: str = "float", block: int | None = None) -> Made:
    """The configuration as the library writes it: names of what is not quantized one by one, and the head by a pattern where nothing of it is."""

    def config(quantized: list[str], kept: list[str]) -> Config:
        weights = SYMMETRIC | {
            "type": kind,
            "strategy": strategy,
            "dynamic": False,
            "block_structure": [block, block] if block else None,
        }
        group = {
            "format": f"{kind}-quantized", "input_activations": SYMMETRIC | {"type": kind} | inputs if inputs else None,
            "output_activations": None, "targets": ["Linear"], "weights": weights,
        }  # fmt: skip
        whole = not any(name.startswith("mtp.") for name in quantized)
        ignore = [*(n for n in kept if not (whole and n.startswith("mtp."))), *(["re:^mtp.*"] if whole else [])]
        return {
            "config_groups": {"group_0": group}, "format": f"{kind}-quantized", "global_compression_ratio": None, "ignore": ignore,
            "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed", "version": "0.20.0",
        }  # fmt: skip

    return config


def _blocks(block: int = 0, **more: Any) -> Callable[[str, Path], Path]:
    def make(model: str, out: Path) -> Path:
        size = block or BLOCK[model]
        inputs = {"dynamic": True, "strategy": "group", "group_size": size}
        return others.quantize(checkpoint(model), out, fp8_blocks(size), said("block", inputs, block=size), **more)

    return make


def _made(write: Write, config: Made, **more: Any) -> Callable[[str, Path], Path]:
    return lambda model, out: others.quantize(checkpoint(model), out, write, config, **more)


TOWER = {"also": lambda module: re.search(r"visual\.blocks\.\d+\.mlp", module) is not None}
AB = {"also": lambda module: re.search(r"linear_attn\.in_proj_[ab]$", module) is not None}
KINDS: dict[str, Callable[[str, Path], Path]] = {
    "ct-fp8": _made(fp8_rows, said("channel", TOKENS)),
    "ct-fp8-head": _made(fp8_rows, said("channel", TOKENS), head=True),
    "ct-fp8-tower": _made(fp8_rows, said("channel", TOKENS), **TOWER),
    "ct-fp8-ba": _made(fp8_rows, said("channel", TOKENS), **AB),
    "ct-fp8-static": _made(fp8_one, said("tensor", ALL_TOKENS)),
    "ct-fp8-static-head": _made(fp8_one, said("tensor", ALL_TOKENS), head=True),
    "ct-fp8-rows-static": _made(fp8_rows_static, said("channel", ALL_TOKENS)),
    "ct-fp8-one-dynamic": _made(fp8_one_dynamic, said("tensor", TOKENS)),
    "ct-fp8-a16": _made(fp8_one_dynamic, said("tensor", None)),
    "ct-fp8-blocks": _blocks(),
    "ct-fp8-blocks-head": _blocks(head=True),
    "ct-fp8-blocks-ba": _blocks(**AB),
    "ct-fp8-blocks-128": _blocks(128),
    "ct-int8": _made(int8_rows, said("channel", TOKENS, "int")),
    "ct-int8-head": _made(int8_rows, said("channel", TOKENS, "int"), head=True),
    "ct-int8-one": _made(int8_one, said("tensor", TOKENS, "int")),
}


Change = Callable[[Config], None]
Edit = Callable[[Tensors], None]
FINE = ("", "", "", "")


def _ignoring(*entries: str, without: str = "") -> Change:
    """`ignore` with further entries, or without those that hold a part of a name."""

    def change(config: Config) -> None:
        config["ignore"] = [entry for entry in config["ignore"] if not (without and without in entry)] + list(entries)

    return change


def _group(**changes: Any) -> Change:
    """What a group says of weights and inputs changed, key by key."""

    def change(config: Config) -> None:
        for key, values in changes.items():
            config["config_groups"]["group_0"][key] |= values

    return change


def _says_fp8(config: Config) -> None:
    """The configuration of FP8_DYNAMIC over whatever is stored."""
    config.update(said("channel", TOKENS)([], []) | {"ignore": config["ignore"]})


def _gone(end: str) -> Edit:
    def edit(tensors: Tensors) -> None:
        (name,) = [n for n in tensors if n.endswith(end)]
        del tensors[name]

    return edit


def _loose(tensors: Tensors) -> None:
    """Scales of one number without a dimension."""
    for name in [n for n in tensors if tensors[n].shape == (1,)]:
        tensors[name] = tensors[name].reshape(())


HEAD = "re:^mtp"
GATE = "model.language_model.layers.1.mlp.gate_proj"
CASES: dict[str, tuple[str, str, Change | None, Edit | None, tuple[str, str, str, str]]] = {
    "good dense ct fp8": ("dense", "ct-fp8", None, None, FINE),
    "good moe ct fp8": ("moe", "ct-fp8", None, None, FINE),
    "good dense ct fp8 with its head": ("dense", "ct-fp8-head", None, None, FINE),
    "good moe ct fp8 with its head": ("moe", "ct-fp8-head", None, None, FINE),
    "good dense ct fp8, a and b": ("dense", "ct-fp8-ba", None, None, FINE),
    "good dense ct fp8 static": ("dense", "ct-fp8-static", None, None, FINE),
    "good moe ct fp8 static": ("moe", "ct-fp8-static", None, None, ("", "", "", "lost")),
    "good moe ct fp8 static with its head": ("moe", "ct-fp8-static-head", None, None, ("", "", "", "lost")),
    "good dense ct fp8 static, bare numbers": ("dense", "ct-fp8-static", None, _loose, FINE),
    "good dense ct fp8 blocks": ("dense", "ct-fp8-blocks", None, None, FINE),
    "good moe ct fp8 blocks": ("moe", "ct-fp8-blocks", None, None, ("", "", "", "refuses")),
    "good moe ct fp8 blocks with its head": ("moe", "ct-fp8-blocks-head", None, None, ("", "", "", "refuses")),
    "good dense ct int8": ("dense", "ct-int8", None, None, FINE),
    "good dense ct int8 with its head": ("dense", "ct-int8-head", None, None, FINE),
    "good dense ct int8, one scale": ("dense", "ct-int8-one", None, None, FINE),
    "good moe ct int8": ("moe", "ct-int8", None, None, ("", "refuses", "refuses", "refuses")),
    "good moe ct int8 with its head": ("moe", "ct-int8-head", None, None, ("", "refuses", "refuses", "refuses")),
    "ct int8 experts, one scale": ("moe", "ct-int8-one", None, None, ("refuses", "refuses", "refuses", "refuses")),
    "good dense ct fp8 rows, static inputs": ("dense", "ct-fp8-rows-static", None, None, FINE),
    "ct fp8 experts by row, static inputs": ("moe", "ct-fp8-rows-static", None, None, ("refuses", "refuses", "refuses", "lost")),
    "good dense ct fp8 one scale, dynamic inputs": ("dense", "ct-fp8-one-dynamic", None, None, FINE),
    "ct fp8 experts with one scale, dynamic inputs": ("moe", "ct-fp8-one-dynamic", None, None, ("refuses", "refuses", "refuses", "")),
    "good dense ct fp8 one scale, weight-only": ("dense", "ct-fp8-a16", None, None, FINE),
    "ct fp8 experts with one scale, weight-only": ("moe", "ct-fp8-a16", None, None, ("refuses", "refuses", "refuses", "")),
    "ct fp8: tower quantized": ("dense", "ct-fp8-tower", None, None, ("", "wrong", "wrong", "")),
    "ct fp8 blocks: in_proj_a and b quantized": ("dense", "ct-fp8-blocks-ba", None, None, ("refuses", "refuses", "refuses", "")),
    "ct fp8 blocks that do not divide": ("moe", "ct-fp8-blocks-128", None, None, ("refuses", "refuses", "refuses", "refuses")),
    "ct fp8: head missing from ignore": ("dense", "ct-fp8", _ignoring(without=HEAD), None, ("random", "random", "random", "")),
    "ct fp8: head of experts missing from ignore": ("moe", "ct-fp8", _ignoring(without=HEAD), None, ("random", "random", "random", "")),
    "ct fp8: half of a joined module in ignore": ("dense", "ct-fp8", _ignoring(GATE), None, ("refuses", "refuses", "refuses", "wrong")),
    "ct fp8: says one scale": ("dense", "ct-fp8", _group(weights={"strategy": "tensor"}), None, ("refuses", "refuses", "refuses", "refuses")),
    "ct fp8: says static inputs": ("dense", "ct-fp8", _group(input_activations=ALL_TOKENS), None, ("random", "random", "random", "random")),
    "ct fp8 static: says dynamic inputs": ("dense", "ct-fp8-static", _group(input_activations=TOKENS), None, ("refuses", "lost", "lost", "lost")),
    "ct fp8: a scale is missing": ("dense", "ct-fp8", None, _gone("layers.3.self_attn.k_proj.weight_scale"), ("random", "random", "random", "random")),
    "ct fp8 static: an input scale is missing": ("dense", "ct-fp8-static", None, _gone("layers.3.self_attn.k_proj.input_scale"), ("random", "random", "random", "random")),
    "ct int8: a scale of an expert is missing": ("moe", "ct-int8", None, _gone("layers.2.mlp.experts.7.down_proj.weight_scale"), ("random", "refuses", "refuses", "refuses")),
    "ct int8: says fp8": ("dense", "ct-int8", _says_fp8, None, ("wrong", "wrong", "wrong", "wrong")),
    "ct int8: head missing from ignore": ("dense", "ct-int8", _ignoring(without=HEAD), None, ("random", "random", "random", "")),
}  # fmt: skip
"""As `others.OTHERS`."""
