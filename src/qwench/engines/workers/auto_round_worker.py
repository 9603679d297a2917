"""Ask auto-round: `python auto_round_worker.py FOLDER`, with the python of its own environment; see `qwench.engines.base` for what lies in FOLDER.

auto-round's way to run its releases is transformers' `from_pretrained`: with auto-round installed, transformers hands it the network before loading, auto-round
puts its own layers wherever the config says that something is quantized, and those keep codes, zero points and scales and decode them at every call. So the
loading report is transformers', and the numbers are those of auto-round's layers.

Two things are theirs: scales become float16 whatever the model computes in, and MTP heads are skipped by transformers.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import auto_round
import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers_worker import account, arrays, generate, images  # type: ignore[import-not-found]  # beside this script


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    versions = f"{auto_round.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    answer: dict[str, Any] = {"version": versions}
    try:
        _serve(request, folder, answer)
    except Exception as error:
        traceback.print_exc()
        answer["refused"] = f"{type(error).__name__}: {str(error).strip()[:600]}"
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _serve(request: dict[str, Any], folder: Path, answer: dict[str, Any]) -> None:
    """Load; then the rows, a few tokens, the images."""
    if request["adapter"]:
        raise ValueError("auto-round has no way to add an adapter to what it loads: verify it with gptqmodel or vllm")
    checkpoint = Path(request["folder"])
    model, info = load(checkpoint)
    account(checkpoint, model, info, answer)
    answer["notes"].append(built(model))
    model = model.to(getattr(torch, request["dtype"]))
    with torch.no_grad():
        for number, row in enumerate(request["rows"]):
            np.savez(folder / f"row{number}.npz", **arrays(model, row, request["top_k"]))
        answer["generated"] = generate(model, torch.tensor([request["rows"][0]]), request["generate"])
        if request["image"] and hasattr(model.config, "vision_config") and (checkpoint / "preprocessor_config.json").is_file():
            answer["image"] = images(model, checkpoint, request["rows"][0][:4])


def load(checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """The model by the architecture that its config names, in bfloat16, and transformers' report on loading it."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    named = (config.architectures or [""])[0]
    loader = AutoModelForImageTextToText if named.endswith("ForConditionalGeneration") else AutoModelForCausalLM
    model, info = loader.from_pretrained(checkpoint, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True)
    return model.eval(), info


def built(model: Any) -> str:
    """How many modules it decodes, and from what."""
    quantized = [m for m in model.modules() if hasattr(m, "qweight")]
    counts = Counter((m.bits, m.group_size, type(m).__module__.rpartition(".")[2]) for m in quantized)
    kinds = [f"{count} INT{bits} in groups of {group} ({name})" for (bits, group, name), count in sorted(counts.items())]
    return f"auto-round built quantized modules: {', '.join(kinds) or 'none'}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
