"""Ask transformers: `python transformers_worker.py FOLDER`; see `qwench.engines.base` for what lies in FOLDER.

Transformers decodes a compressed-tensors checkpoint to plain matrices while it loads: a good judge of names and formats, and no kernel is involved. Its MTP support
ends at loading: `mtp.*` is skipped without a word, and counted here as ignored by design.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from answering import run_worker  # type: ignore[import-not-found,unused-ignore]  # beside this script, which is run by path
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText


def serve(request: dict[str, Any], folder: Path, told: dict[str, Any]) -> None:
    """Load; then the rows, a few tokens, the images."""
    torch.set_num_threads(request["threads"])
    model, info = load(Path(request["folder"]), getattr(torch, request["dtype"]))
    account(Path(request["folder"]), model, info, told)
    say(model, request, folder, told)


def say(model: Any, request: dict[str, Any], folder: Path, told: dict[str, Any]) -> None:
    """What a loaded model answers: log-probabilities of the rows, tokens after the first of them, what two images change."""
    checkpoint = Path(request["folder"])
    with torch.no_grad():
        for number, row in enumerate(request["rows"]):
            np.savez(folder / f"row{number}.npz", **arrays(model, row, request["top_k"]))
        told["generated"] = generate(model, torch.tensor([request["rows"][0]]), request["generate"])
        if request["image"] and hasattr(model.config, "vision_config") and (checkpoint / "preprocessor_config.json").is_file():
            told["image"] = images(model, checkpoint, request["rows"][0][:4])


def load(checkpoint: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model by the architecture that its config names, and transformers' report on loading it.

    Some formats are decoded at the first forward pass, to bfloat16 whatever was asked: those go through one before they change their dtype.
    """
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    named = (config.architectures or [""])[0]
    loader = AutoModelForImageTextToText if named.endswith("ForConditionalGeneration") else AutoModelForCausalLM
    quantized = hasattr(config, "quantization_config")
    arguments: dict[str, Any] = dict(local_files_only=True, output_loading_info=True, experts_implementation="eager")
    model, info = loader.from_pretrained(checkpoint, dtype=torch.bfloat16 if quantized else dtype, **arguments)
    if quantized:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    return model.to(dtype).eval(), info


def account(checkpoint: Path, model: Any, info: dict[str, Any], told: dict[str, Any]) -> None:
    """Which stored tensors it took, which it skips by design, which it did not know; which of its own parameters nothing reached."""
    skipped = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []]
    reason = f"{type(model).__name__} skips it by design"
    names = list(stored(checkpoint))
    told["ignored"] = {name: reason for name in names if any(p.search(name) for p in skipped)}
    unknown = {str(key) for key in info["unexpected_keys"]}
    told["consumed"] = [name for name in names if name not in told["ignored"] and name not in unknown]
    told["uninitialized"] = sorted(map(str, info["missing_keys"])) + [
        f"{key[0]}: shapes differ" for key in info["mismatched_keys"]
    ]
    strange = sorted(unknown.difference(names))
    told["notes"] = [f"transformers reports keys under names of its own: {', '.join(strange[:4])}"] if strange else []


def stored(checkpoint: Path) -> Iterator[str]:
    """Names of the tensors in the safetensors files that the index names, or in all files where there is no index."""
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        yield from json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from (name for name in header if name != "__metadata__")


def arrays(model: Any, row: list[int], top_k: int | None) -> dict[str, Any]:
    """Log-probabilities of a row, in float32."""
    logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1].float()
    logprobs = torch.log_softmax(logits, -1)
    if top_k is None:
        return {"logprobs": logprobs.numpy()}
    best, tokens = logprobs.topk(top_k)
    return {"logprobs": best.numpy(), "tokens": tokens.numpy()}


def generate(model: Any, ids: Tensor, length: int, **inputs: Any) -> list[int]:
    """`length` greedy tokens, whatever the end token."""
    mask = torch.ones_like(ids)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
        **inputs,
    )
    return [int(token) for token in out[0, ids.shape[1] :]]


def images(model: Any, checkpoint: Path, words: list[int]) -> dict[str, Any]:
    """One prompt with two different images: what each makes the model say, and whether its logits notice."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint, local_files_only=True)
    config, said, logits, count = model.config, [], [], 0
    for seed in (0, 1):
        pixels = np.random.default_rng(seed).integers(0, 256, (288, 320, 3), dtype=np.uint8)
        seen = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        grid = seen["image_grid_thw"]
        count = int(grid.prod()) // processor.merge_size**2
        prompt = [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id, *words]
        ids = torch.tensor([prompt])
        inputs = {
            "pixel_values": seen["pixel_values"].to(model.dtype),
            "image_grid_thw": grid,
            "mm_token_type_ids": (ids == config.image_token_id).long(),
        }
        said.append(generate(model, ids, 6, **inputs))
        logits.append(model(input_ids=ids, **inputs).logits[0, -1].float())
    return {"tokens": count, "generated": said[0], "differs": not torch.equal(logits[0], logits[1])}


if __name__ == "__main__":
    run_worker(f"{transformers.__version__}, torch {torch.__version__}", serve)
