"""Checkpoints in formats of other writers, written with plain torch: block FP8 as Qwen's own releases have it, AWQ, ModelOpt's FP8 and NVFP4, bitsandbytes.

Nothing here asks our package how these bytes lie: it is written from the formats' own descriptions, so that what reads or lays them out is judged by something else.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Config = dict[str, Any]
QUANTIZED = re.compile(
    r"\.(?:self_attn\.[qkvo]_proj|linear_attn\.(?:in_proj_qkv|in_proj_z|out_proj)|mlp(?:\.shared_expert|\.experts\.\d+)?\.(?:gate|up|down)_proj)$"
)
"""Modules that vendors quantize, in any layer."""
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns lies in each four bits of a word, lowest first."""


def fp8_block(block: int) -> Callable[[str, Tensor], Tensors]:
    """DeepSeek's layout: codes, and a factor for each block under the name of its inverse."""

    def write(module: str, weight: Tensor) -> Tensors:
        rows, columns = -(-weight.shape[0] // block), -(-weight.shape[1] // block)
        padded = torch.zeros(rows * block, columns * block)
        padded[: weight.shape[0], : weight.shape[1]] = weight.float()
        tiles = padded.view(rows, block, columns, block)
        scale = tiles.abs().amax((1, 3)).clamp(min=1e-6) / 448
        codes = (tiles / scale[:, None, :, None]).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]
        return {f"{module}.weight": codes.to(torch.float8_e4m3fn), f"{module}.weight_scale_inv": scale}

    return write


def fp8_tensor(module: str, weight: Tensor) -> Tensors:
    """ModelOpt's FP8: one factor for the weight, one for its inputs."""
    scale = weight.float().abs().amax() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale, f"{module}.input_scale": torch.tensor(0.01)}


def awq(group: int) -> Callable[[str, Tensor], Tensors]:
    """AutoAWQ's GEMM layout: columns of the output packed eight to a word, zero points likewise."""

    def write(module: str, weight: Tensor) -> Tensors:
        inner = weight.float().t().reshape(-1, group, weight.shape[0])
        low, high = inner.amin(1), inner.amax(1)
        scale = ((high - low) / 15).clamp(min=1e-5)
        zero = (-low / scale).round().clamp(0, 15)
        codes = (inner / scale[:, None] + zero[:, None]).round().clamp(0, 15).reshape(weight.shape[1], weight.shape[0])
        return {f"{module}.qweight": _words(codes), f"{module}.qzeros": _words(zero), f"{module}.scales": scale.half()}

    return write


def _words(codes: Tensor) -> Tensor:
    """[n, out] of 0..15 to int32 [n, out / 8]."""
    eights = codes.long().view(codes.shape[0], -1, 8)
    words = sum(eights[..., column] << (4 * place) for place, column in enumerate(AWQ_ORDER))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def nvfp4(module: str, weight: Tensor, outer: float | None = None, inputs: bool = True) -> Tensors:
    """ModelOpt's NVFP4: the outer scale is a factor, amax / (6 * 448)."""
    blocks = weight.float().view(weight.shape[0], -1, 16)
    factor = torch.tensor(outer if outer is not None else float(blocks.abs().amax()) / (6 * 448))
    scale = (blocks.abs().amax(-1) / 6 / factor).clamp(2**-6, 448).to(torch.float8_e4m3fn)
    values = blocks / (scale.float() * factor).unsqueeze(-1)
    codes = (values.abs().unsqueeze(-1) - E2M1).abs().argmin(-1) + 8 * (values < 0)
    flat = codes.view(weight.shape[0], -1, 2)
    packed = (flat[..., 0] | flat[..., 1] << 4).to(torch.uint8)
    found = {f"{module}.weight": packed, f"{module}.weight_scale": scale, f"{module}.weight_scale_2": factor}
    return found | ({f"{module}.input_scale": torch.tensor(0.002)} if inputs else {})


def bitsandbytes(module: str, weight: Tensor) -> Tensors:
    """The tensors of a 4-bit layer, by name and shape; what they mean is of no interest here."""
    count = weight.numel()
    return {
        f"{module}.weight": torch.zeros(count // 2, 1, dtype=torch.uint8), f"{module}.weight.absmax": torch.zeros(count // 64, dtype=torch.uint8),
        f"{module}.weight.quant_map": torch.zeros(16), f"{module}.weight.nested_absmax": torch.zeros(max(1, count // 64 // 256)),
        f"{module}.weight.nested_quant_map": torch.zeros(256), f"{module}.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }  # fmt: skip


def quantize(
    source: Path,
    out: Path,
    write: Callable[[str, Tensor], Tensors],
    config: Callable[[list[str], list[str]], Config],
    head: bool = False,
    also: Callable[[str], bool] = lambda module: False,
    but: str = "",
) -> Path:
    """A copy of an unquantized checkpoint in another writer's format; experts come one by one.

    Args:
        write: module, weight -> tensors.
        config: quantized and kept linear modules -> quantization_config.
        head: whether the MTP head is quantized too.
        also: further modules that are quantized.
        but: an expression for the names of modules that are not.
    """  # fmt: skip
    held = one_by_one({name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()})
    made: Tensors = {}
    quantized, kept = list[str](), list[str]()
    for name, tensor in held.items():
        module, matrix = name.removesuffix(".weight"), name.endswith(".weight") and tensor.dim() == 2
        wanted = (
            QUANTIZED.search(module) is not None
            and (head or not module.startswith("mtp."))
            and not (but and re.search(but, module))
        )
        if matrix and (wanted or also(module)):
            quantized.append(module)
            made |= write(module, tensor)
        else:
            kept += [module] if matrix and "embed" not in module else []
            made[name] = tensor
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith("index.json"):
            shutil.copy(path, out / path.name)
    said = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"quantization_config": config(quantized, kept)}
    (out / "config.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in made.items()}, out / "model.safetensors", metadata={"format": "pt"}
    )
    return out


def one_by_one(held: Mapping[str, Tensor]) -> Tensors:
    """The same tensors with fused experts [E, 2I, D] and [E, D, I] taken apart."""
    found: Tensors = {}
    for name, tensor in held.items():
        if name.endswith(".experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for i, both in enumerate(tensor):
                gate, up = both.chunk(2)
                found |= {f"{stem}{i}.gate_proj.weight": gate, f"{stem}{i}.up_proj.weight": up}
        elif name.endswith(".experts.down_proj"):
            found |= {f"{name.removesuffix('down_proj')}{i}.down_proj.weight": one for i, one in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def fp8_config(block: int) -> Callable[[list[str], list[str]], Config]:
    """As Qwen writes it: names, one by one."""
    return lambda quantized, kept: {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [block, block], "modules_to_not_convert": listed(kept),
    }  # fmt: skip


def awq_config(group: int, *entries: str) -> Callable[[list[str], list[str]], Config]:
    """As AutoAWQ writes it: parts of names."""
    return lambda quantized, kept: {
        "bits": 4, "group_size": group, "modules_to_not_convert": list(entries), "quant_method": "awq", "version": "gemm", "zero_point": True,
    }  # fmt: skip


def modelopt_config(algo: str, **more: Any) -> Callable[[list[str], list[str]], Config]:
    """As ModelOpt writes it into config.json: names and wildcards."""

    def config(quantized: list[str], kept: list[str]) -> Config:
        trees = ["model.visual*", *(["mtp*"] if not any(name.startswith("mtp.") for name in quantized) else [])]
        names = [name for name in listed(kept) if not name.startswith(("model.visual.", "mtp."))]
        heads = [name for name in listed(kept) if name.startswith("mtp.")] if len(trees) == 1 else []
        return {
            "quant_algo": algo, "quant_method": "modelopt", "producer": {"name": "modelopt", "version": "0.40.0"},
            "ignore": [*trees, *names, *heads], **({"group_size": 16} if "FP4" in algo else {}), **more,
        }  # fmt: skip

    return config


def listed(kept: list[str]) -> list[str]:
    """Kept modules as lists have them: of experts that are kept whole their holder too."""
    holders = dict.fromkeys(name.partition(".experts.")[0] + ".experts" for name in kept if ".experts." in name)
    return [*(name for name in kept if ".experts." not in name), *holders]
