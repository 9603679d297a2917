"""What a checkpoint is, for a person: `qwench inspect`. Reads headers only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from qwench import display
from qwench.checkpoint.source import TensorSource
from qwench.models.facts import RESERVE, Facts, facts
from qwench.models.geometry import Complaint

GIB = 2**30
USUAL_CONTEXT = 32768


def inspection(source: TensorSource, name: str, context: int | None, vram: float | None) -> dict[str, Any]:
    """Everything that the tables show, sizes in bytes.

    Args:
        name: what the person called the checkpoint.
        context: tokens for the cache sizes; None: the model's own context, up to 32768.
        vram: GiB of a GPU to fit, or None.
    """
    found = facts(source)
    context = context or min(found.context or USUAL_CONTEXT, USUAL_CONTEXT)
    return {
        "model": name,
        "model_type": found.model_type,
        "layout": found.layout,
        "experts": found.experts,
        "layers": found.pattern,
        "mtp": found.mtp,
        "vision": found.vision,
        "tied": found.tied,
        "context": found.context,
        "tensors": found.tensors,
        "parameters": found.parameters,
        "bytes": found.bytes,
        "files": found.files,
        "dtypes": found.dtypes,
        "quantization": source.config.get("quantization_config", {}).get("quant_method"),
        "components": [vars(c) for c in found.components],
        "caches": _caches(found, context),
        "fits": _fit(found, context, vram) if vram else None,
        "losses": [{"what": what, "mend": mend} for what, mend in losses(found)],
        "complaints": [{"what": what, "mend": mend} for what, mend in found.complaints],
    }


def losses(found: Facts) -> Iterator[Complaint]:
    """What the config announces and the files do not hold: (what, mend)."""
    if found.mtp == "missing":
        yield (
            f"the MTP head is missing: config.json announces {found.geometry.mtp_layers} layer of it (mtp_num_hidden_layers) and no mtp.* tensor is stored; "
            "fine-tuning tools drop it without a word, and without it there is no speculation",
            "take it from the base checkpoint: a recipe with the step `graft: {}`, and `qwench run RECIPE --model THIS --donor BASE`",
        )
    if found.vision == "missing":
        yield (
            "the vision tower is missing: config.json announces it (vision_config) and no model.visual.* tensor is stored; "
            "the classes of conditional generation would fill it with random numbers",
            "take it from the base checkpoint (`graft: {components: [vision]}`, --donor BASE), or leave it behind: `export: {layout: text}`",
        )


def _caches(found: Facts, context: int) -> dict[str, Any]:
    with_mtp = found.mtp == "present"
    return {
        "context": context,
        "kv_bf16": found.kv_bytes(context, mtp=with_mtp),
        "kv_fp8": found.kv_bytes(context, dtype="fp8_e4m3", mtp=with_mtp),
        "recurrent_state": found.state_bytes(),
    }


def _fit(found: Facts, context: int, vram: float) -> dict[str, Any]:
    """What does and does not fit a GPU: weights, then weights with caches at the context asked for."""
    memory = int(vram * GIB)
    with_mtp = found.mtp == "present"
    limits = {kv: found.max_context(memory, dtype=kv, mtp=with_mtp) for kv in ("bfloat16", "fp8_e4m3")}
    needed = found.bytes + found.state_bytes() + found.kv_bytes(context, mtp=with_mtp)
    return {
        "vram": memory,
        "weights_fit": limits["bfloat16"] is not None,
        "needed_at_context": needed,
        "longest_context_bf16_cache": limits["bfloat16"],
        "longest_context_fp8_cache": limits["fp8_e4m3"],
    }


def show(data: dict[str, Any], console: Console) -> None:
    """The tables of `qwench inspect`."""
    experts = ", ".join(f"{where}: {how}" for where, how in data["experts"].items())
    rows = [
        ("model", data["model"]),
        ("type", f"{data['model_type']}, {data['layout']}"),
        ("quantization", data["quantization"] or "none"),
        ("layers", data["layers"]),
        ("experts stored", experts or "none"),
        ("MTP head", data["mtp"]),
        ("vision tower", data["vision"]),
        ("embedding and head", "tied" if data["tied"] else "untied"),
        ("context", f"{data['context']:,} tokens"),
        (
            "stored",
            f"{data['tensors']:,} tensors in {data['files']} files, {display.size(data['bytes'])}"
            if data["files"]
            else "nothing: what config.json describes",
        ),
        ("dtypes", ", ".join(f"{dtype} {display.size(count)}" for dtype, count in data["dtypes"].items())),
    ]
    console.print(display.table("Checkpoint", ["what", "found"], rows))
    parts = [(c["component"], c["tensors"], c["parameters"], display.size(c["bytes"])) for c in data["components"]]
    console.print(display.table("Components", ["component", "tensors", "parameters", "size"], parts))
    caches = data["caches"]
    console.print(
        f"caches of one sequence at {caches['context']:,} tokens: KV {display.size(caches['kv_bf16'])} in BF16 or "
        f"{display.size(caches['kv_fp8'])} in FP8, recurrent state {display.size(caches['recurrent_state'])}"
    )
    if data["fits"]:
        console.print(_fit_line(data["fits"], caches["context"]))
    for loss in data["losses"]:
        console.print(f"lost: {loss['what']}\n  mend: {loss['mend']}", markup=False)
    for complaint in data["complaints"]:
        console.print(f"wrong: {complaint['what']}\n  mend: {complaint['mend']}", markup=False)


def _fit_line(fits: dict[str, Any], context: int) -> str:
    vram = display.size(fits["vram"])
    if not fits["weights_fit"]:
        return f"does not fit {vram}: weights and states alone are too large"
    verdict = "fits" if fits["needed_at_context"] + RESERVE <= fits["vram"] else "does not fit"
    return (
        f"{verdict} {vram} at {context:,} tokens (needs {display.size(fits['needed_at_context'])} and about 1 GiB for the engine); "
        f"longest context: {fits['longest_context_bf16_cache']:,} with a BF16 cache, {fits['longest_context_fp8_cache']:,} with FP8"
    )
