"""Let vLLM itself load checkpoints, and only load: `python vllm_loads.py WORKERS REQUEST ANSWER`, with the python of vLLM's environment.

REQUEST is a JSON list of folders; ANSWER becomes, for each, the models that were built: their parameters, what they took, what nothing wrote, and why vLLM stopped, if it did. Both
networks are loaded even where the first is refused. Building and loading one takes about a second, since no cache is made and nothing is run.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

WORKERS, REQUEST, ANSWER = (Path(name) for name in sys.argv[1:4])
sys.path.insert(0, str(WORKERS))

import torch  # noqa: E402
import vllm_kernels  # noqa: E402
import vllm_stand_ins  # noqa: E402
from vllm_ledger import Ledger  # noqa: E402


def main() -> None:
    ledger = Ledger().install()
    vllm_stand_ins.install()
    vllm_kernels.install()
    ANSWER.write_text(json.dumps([loads(ledger, folder) for folder in json.loads(REQUEST.read_text())]))


def loads(ledger: Ledger, folder: str) -> list[dict[str, Any]]:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    names = {path.name for path in Path(folder).iterdir()}
    head = any("mtp." in line for line in _names(Path(folder)))
    draft = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}} if head else {}
    try:
        config = EngineArgs(
            model=folder,
            dtype="bfloat16",
            max_model_len=256,
            enforce_eager=True,
            skip_tokenizer_init="tokenizer.json" not in names,
            **draft,
        ).create_engine_config()
    except Exception as error:
        traceback.print_exc()
        return [{"refused": _said(error)}]
    with set_current_vllm_config(config):
        _one_process()
        found = [_load(ledger, lambda: get_model(vllm_config=config))]
        if head:
            drafting = config.speculative_config.draft_model_config
            found.append(_load(ledger, lambda: get_model(vllm_config=config, model_config=drafting)))
    return found


def _load(ledger: Ledger, make: Any) -> dict[str, Any]:
    """One model: what the ledger saw of it. What comes after loading (repacking for kernels) is not asked about."""
    before, parameters, whole = len(ledger.loads), list[str](), list[bool]()

    def watch(model: Any, load: Any) -> None:
        parameters.extend(name for name, _ in model.named_parameters())
        Ledger.watch(ledger, model, load)
        whole.append(True)

    ledger.watch, refused = watch, None
    try:
        make()
    except Exception as error:
        refused = None if whole else _said(error)
        traceback.print_exc()
    gc.collect()
    if len(ledger.loads) == before:
        return {"refused": refused}
    seen = ledger.loads[-1]
    return {
        "refused": refused, "model": seen.model, "parameters": parameters, "given": seen.given,
        "consumed": sorted(seen.consumed), "uninitialized": seen.uninitialized,
    }  # fmt: skip


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def _names(folder: Path) -> list[str]:
    from safetensors import safe_open

    found: list[str] = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found += file.keys()
    return found


def _one_process() -> None:
    """Groups of one process, which vLLM wants before it builds anything; those of experts only where there are some."""
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.distributed.parallel_state import destroy_model_parallel

    if not torch.distributed.is_initialized():
        init_distributed_environment(1, 0, f"file://{ANSWER}.group", 0, "gloo")
    destroy_model_parallel()
    ensure_model_parallel_initialized(1, 1)


if __name__ == "__main__":
    main()
