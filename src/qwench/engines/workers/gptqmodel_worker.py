"""Ask GPTQModel: `python gptqmodel_worker.py FOLDER`, with the python of its own environment; see `qwench.engines.base` for what lies in FOLDER.

GPTQModel builds the network with transformers, puts a quantized layer wherever `dynamic` and its own table of modules say so, and has accelerate fill both from
the files. Accelerate passes over what it does not know, with a warning. So we watch the memory: everything is noise before loading, and afterwards it is compared,
with the noise (what still holds it was never reached) and with the files (a stored tensor was consumed where the model holds its values under its name).

The kernel is `TorchLinear`, the one that runs anywhere. It is chosen for 16-bit numbers only; asked for float32, the model is loaded in bfloat16, which holds our
scales exactly, and widened then: the same codes and scales, multiplied in float32.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from answering import run_worker  # type: ignore[import-not-found,unused-ignore]  # beside this script, which is run by path
from safetensors import safe_open
from torch import Tensor
from transformers_worker import say, stored  # type: ignore[import-not-found]  # beside this script
from vllm_ledger import noise_like, untouched  # type: ignore[import-not-found]


def _version() -> str:
    import transformers
    from gptqmodel.version import __version__

    return f"{__version__}, transformers {transformers.__version__}, torch {torch.__version__}"


def serve(request: dict[str, Any], folder: Path, told: dict[str, Any]) -> None:
    """Load; then the rows, a few tokens, the images."""
    torch.set_num_threads(request["threads"])
    loaded = load(Path(request["folder"]), request["adapter"], told)
    model = loaded.model.to(getattr(torch, request["dtype"]))
    told["notes"] = [built(model)]
    told["corrected"] = corrected(model)
    say(model, request, folder, told)


def load(checkpoint: Path, adapter: str | None, told: dict[str, Any]) -> Any:
    """The model as GPTQModel loads it, with the adapter's corrections where there is one; what became of each tensor goes into the answer."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.models import loader

    without_processors()
    fill = loader.load_checkpoint_in_model_then_tie_weights

    def watched(model: Any, *arguments: Any, **named: Any) -> None:
        cover(model)
        fill(model, *arguments, **named)
        account(model, checkpoint, told)

    loader.load_checkpoint_in_model_then_tie_weights = watched
    found = GPTQModel.load(
        str(checkpoint),
        backend=BACKEND.TORCH,
        device="cpu",
        dtype=torch.bfloat16,
        adapter=adapter and correction(Path(adapter)),
    )
    told["ignored"] = out_of_model(type(found), checkpoint)
    return found


def without_processors() -> None:
    """GPTQModel loads a processor of images with every model that has a tower, and that processor needs torchvision; nobody asks it here."""
    from gptqmodel.models import auto

    for value in vars(auto).values():
        if isinstance(value, type) and getattr(value, "require_load_processor", False):
            value.require_load_processor = False  # type: ignore[attr-defined]


def correction(adapter: Path) -> Any:
    """GPTQModel's description of an adapter; it wants to be told the rank that the folder says."""
    from gptqmodel.adapter.adapter import Lora

    rank = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    return Lora(path=str(adapter), rank=rank)


def cover(model: Any) -> None:
    """Fill everything that a checkpoint could set with noise."""
    for seed, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(noise_like(tensor, seed).view(tensor.dtype).view(tensor.shape))


def account(model: Any, checkpoint: Path, told: dict[str, Any]) -> None:
    """What still holds its noise, and which stored tensors the model now holds."""
    state: dict[str, Tensor] = model.state_dict()
    told["uninitialized"] = [
        name for seed, (name, tensor) in enumerate(state.items()) if tensor.numel() and untouched(tensor, seed)
    ]
    files = locations(checkpoint)
    told["consumed"] = [n for n in stored(checkpoint) if n in state and holds(state[n], checkpoint / files[n], n)]


def holds(tensor: Tensor, path: Path, name: str) -> bool:
    """Whether a tensor has the values that a file stores under a name, in its own dtype."""
    with safe_open(path, framework="pt") as file:
        values = file.get_tensor(name)
    return tensor.shape == values.shape and torch.equal(tensor, values.to(tensor.dtype))


def locations(checkpoint: Path) -> dict[str, str]:
    """The file of each stored tensor."""
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return dict.fromkeys(stored(checkpoint), "model.safetensors")


def out_of_model(definition: Any, checkpoint: Path) -> dict[str, str]:
    """Stored tensors that GPTQModel's table of this architecture leaves in the files: the MTP head, which transformers has no module for."""
    prefixes = tuple(f"{prefix}." for prefix in (definition.out_of_model_tensors or {}).get("prefixes", ()))
    reason = f"{definition.__name__} leaves them out of the model by design"
    return {name: reason for name in stored(checkpoint) if name.startswith(prefixes)}


def built(model: Any) -> str:
    """How many modules it decodes, and from what."""
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    counts = Counter((m.bits, m.group_size) for m in model.modules() if isinstance(m, BaseQuantLinear))
    kinds = [f"{count} INT{bits} in groups of {group}" for (bits, group), count in sorted(counts.items())]
    return f"GPTQModel built quantized modules: {', '.join(kinds) or 'none'}"


def corrected(model: Any) -> list[str]:
    """Modules whose output an adapter changes."""
    adapters = {name: getattr(module, "adapter", None) for name, module in model.named_modules()}
    return [name for name, adapter in adapters.items() if getattr(adapter, "lora_A", None) is not None]


if __name__ == "__main__":
    run_worker(_version(), serve)
