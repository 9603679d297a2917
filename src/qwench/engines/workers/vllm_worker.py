"""Ask vLLM: `python vllm_worker.py FOLDER`, with the python of vLLM's own environment; see `qwench.engines.base` for what lies in FOLDER.

One `LLM` does everything: with drafts from the MTP head where they are asked for (so that the head is built and loaded by vLLM's own rules), and with images
where the tower is there. An engine that refuses the file is an answer, not a crash: what its loader had done until then is in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import vllm_stand_ins  # type: ignore[import-not-found]
from answering import run_worker  # type: ignore[import-not-found,unused-ignore]  # beside this script, which is run by path
from vllm_ledger import Ledger  # type: ignore[import-not-found]

UNREAD = "input_global_scale"
"""Allocated for NVFP4 experts, and not read where activations stay as they are."""

ORDER = ".g_idx"
"""The order of columns in GPTQ files. vLLM refuses files that have one, and drops the tensors of those that have none."""

HEAD = "mtp."

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for; an adapter runs in the next one that is large enough."""


def main() -> None:
    ledger = Ledger().install()
    vllm_stand_ins.install()
    run_worker(_version(), serve, lambda request, told: _account(ledger, request, told))


def _version() -> str:
    import torch
    import vllm

    return f"{vllm.__version__}, torch {torch.__version__}"


def serve(request: dict[str, Any], folder: Path, told: dict[str, Any]) -> None:
    """Load; then the rows, the image, and what was drafted and accepted."""
    from vllm import LLM

    config = json.loads((Path(request["folder"]) / "config.json").read_text(encoding="utf-8"))
    length = max(len(row) for row in request["rows"])
    image = request["image"] and _sees(Path(request["folder"]), config)
    arguments: dict[str, Any] = dict(
        model=request["folder"], dtype=request["dtype"], max_model_len=length + max(request["generate"], 16) + 256, max_num_seqs=2,
        enforce_eager=True, max_logprobs=request["top_k"] or -1, enable_prefix_caching=False, disable_log_stats=False,
        skip_tokenizer_init=not (Path(request["folder"]) / "tokenizer.json").is_file(), seed=0,
    )  # fmt: skip
    if "vision_config" in config:
        arguments["limit_mm_per_prompt"] = {"image": int(image), "video": 0}
    if request["speculate"]:
        arguments["speculative_config"] = {"method": "mtp", "num_speculative_tokens": request["speculate"]}
    if request["adapter"] and request["speculate"]:
        raise ValueError(
            "vLLM 0.32 computes wrong log-probabilities where it drafts and adapters are enabled: ask for one of them"
        )
    if request["adapter"]:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _room(Path(request["adapter"]))}
    llm = LLM(**arguments)
    _rows(llm, request, folder, told)
    told["corrected"] = _corrected(llm) if request["adapter"] else []
    if request["speculate"]:
        told["speculation"] = _counts(llm)
    if image:
        told["image"] = _images(llm, request, config)


def _sees(folder: Path, config: dict[str, Any]) -> bool:
    return (
        "vision_config" in config and (folder / "preprocessor_config.json").is_file() and (folder / "tokenizer.json").is_file()
    )


def _room(adapter: Path) -> int:
    """The rank to make room for. Raises ValueError where vLLM has none that is large enough."""
    rank = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    if rank > RANKS[-1]:
        raise ValueError(f"vLLM serves adapters up to rank {RANKS[-1]}, this one has {rank}")
    return next(size for size in RANKS if size >= rank)


def _served(request: dict[str, Any]) -> dict[str, Any]:
    """What every call to `generate` is given: the adapter, where there is one."""
    from vllm.lora.request import LoRARequest

    return {"lora_request": LoRARequest("corrections", 1, request["adapter"])} if request["adapter"] else {}


def _corrected(llm: Any) -> list[str]:
    """Modules that hold the adapter's factors, under vLLM's names; of what it has fused, the members, all of which must have theirs."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    manager = runner.lora_manager._adapter_manager
    found: list[str] = []
    for name, module in manager.modules.items():
        given = [bool(left.any()) for left in getattr(module, "lora_b_stacked", ())]
        members = manager.packed_modules.get(name, [name])
        if len(given) == len(members):
            found += [member for member, there in zip(members, given, strict=True) if there]
        elif given and all(given):  # in_proj_qkvz is four slices of two members
            found += members
    return sorted(found)


def _rows(llm: Any, request: dict[str, Any], folder: Path, told: dict[str, Any]) -> None:
    """Log-probabilities of every row; greedy tokens after the first, or where the head drafts, after each: one text says little about acceptance."""
    from vllm import SamplingParams

    top = request["top_k"] or -1
    for number, row in enumerate(request["rows"]):
        length = request["generate"] if number == 0 or request["speculate"] else 1
        sampling = SamplingParams(temperature=0, max_tokens=length, prompt_logprobs=top, ignore_eos=True, detokenize=False)
        output = llm.generate([{"prompt_token_ids": row}], sampling, use_tqdm=False, **_served(request))[0]
        if number == 0:
            told["generated"] = list(output.outputs[0].token_ids)
        np.savez(folder / f"row{number}.npz", **_arrays(output.prompt_logprobs[1:], request["top_k"]))


def _arrays(places: list[dict[int, Any]], top_k: int | None) -> dict[str, Any]:
    """The k most likely tokens of each place; vLLM adds the token that stands there, which is left out where it is not among them."""
    if top_k is None:
        return {"logprobs": np.array([[place[t].logprob for t in range(len(place))] for place in places], np.float32)}
    best = [sorted(place.items(), key=lambda item: -item[1].logprob)[:top_k] for place in places]
    return {
        "tokens": np.array([[token for token, _ in place] for place in best], np.int64),
        "logprobs": np.array([[entry.logprob for _, entry in place] for place in best], np.float32),
    }


def _counts(llm: Any) -> dict[str, Any]:
    """Drafts, drafted tokens, accepted tokens, accepted by position."""
    found = {m.name.removeprefix("vllm:spec_decode_num_"): m for m in llm.get_metrics() if "spec_decode_num_" in m.name}
    return {
        "drafts": found["drafts"].value,
        "drafted": found["draft_tokens"].value,
        "accepted": found["accepted_tokens"].value,
        "accepted_by_position": list(found["accepted_tokens_per_pos"].values),
    }


def _images(llm: Any, request: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """One prompt with two different images."""
    from PIL import Image
    from vllm import SamplingParams

    prompt = [config["vision_start_token_id"], config["image_token_id"], config["vision_end_token_id"], *request["rows"][0][:4]]
    said, lengths = [], []
    for seed in (0, 1):
        pixels = np.random.default_rng(seed).integers(0, 256, (288, 320, 3), dtype=np.uint8)
        question = {"prompt_token_ids": prompt, "multi_modal_data": {"image": Image.fromarray(pixels)}}
        sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=5, ignore_eos=True, detokenize=False)
        output = llm.generate([question], sampling, use_tqdm=False, **_served(request))[0]
        said.append(
            [(t, round(p[t].logprob, 4)) for t, p in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)]
        )
        lengths.append(len(output.prompt_token_ids) - len(prompt) + 1)
    return {"tokens": lengths[0], "generated": [t for t, _ in said[0]], "differs": said[0] != said[1]}


def _account(ledger: Ledger, request: dict[str, Any], told: dict[str, Any]) -> None:
    quantizes_activations = any(name.endswith(UNREAD) for load in ledger.loads for name in load.given)
    given = [name for load in ledger.loads for name in load.given]
    told["consumed"] = ledger.consumed
    told["ignored"] = {name: "vLLM drops g_idx: nothing is ordered" for name in given if name.endswith(ORDER)}
    if not request["speculate"]:
        told["ignored"] |= {name: "vLLM builds no MTP head where it does not draft" for name in given if name.startswith(HEAD)}
    told["uninitialized"] = [n for n in ledger.uninitialized if quantizes_activations or not n.endswith(UNREAD)]
    told["notes"] = [
        f"{load.model}: {len(load.given)} tensors handed over, {len(load.consumed)} taken" for load in ledger.loads
    ]
    told["stand_ins"] = vllm_stand_ins.used


if __name__ == "__main__":
    main()
