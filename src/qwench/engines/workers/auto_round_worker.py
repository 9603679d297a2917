"""Ask auto-round: `python auto_round_worker.py FOLDER`, with the python of its own environment; see `qwench.engines.base` for what lies in FOLDER.

auto-round's way to run its releases is transformers' `from_pretrained`: with auto-round installed, transformers hands it the network before loading, auto-round
puts its own layers wherever the config says that something is quantized, and those keep codes, zero points and scales and decode them at every call. So the
loading report is transformers', and the numbers are those of auto-round's layers.

Two things are theirs: scales become float16 whatever the model computes in, and MTP heads are skipped by transformers.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import auto_round
import torch
import transformers
from answering import run_worker  # type: ignore[import-not-found,unused-ignore]  # beside this script, which is run by path
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers_worker import account, say  # type: ignore[import-not-found]  # beside this script


def serve(request: dict[str, Any], folder: Path, told: dict[str, Any]) -> None:
    """Load; then the rows, a few tokens, the images."""
    if request["adapter"]:
        raise ValueError("auto-round has no way to add an adapter to what it loads: verify it with gptqmodel or vllm")
    torch.set_num_threads(request["threads"])
    model, info = load(Path(request["folder"]))
    account(Path(request["folder"]), model, info, told)
    told["notes"].append(built(model))
    say(model.to(getattr(torch, request["dtype"])), request, folder, told)


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
    run_worker(f"{auto_round.__version__}, transformers {transformers.__version__}, torch {torch.__version__}", serve)
