"""Which engine reads which quantization method at all, and what becomes of a file in a method that an engine does not read.

| | what it does with a `quant_method` that it does not know |
|---|---|
| vLLM 0.32 | stops: "Unknown quantization method" (`config/model.py`, `_verify_quantization`) |
| SGLang | stops (`configs/model_config.py`, `_verify_quantization`) |
| transformers 5.23 | warns, and loads the file as if it were not quantized (`quantizers/auto.py`, `AutoHfQuantizer.supports_quant_method`) |

A method that an engine reads and that its table here does not play through is `unlooked`: nothing is said about the file then, and that is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qwench.loading import modelopt
from qwench.loading.findings import Finding
from qwench.loading.parts import Load

Reading = Literal["replayed", "unlooked", "refused", "ignored"]
OURS = ("compressed-tensors", "gptq", "auto-round")
REPLAYED: dict[str, tuple[str, ...]] = {
    "vllm": (*OURS, "fp8", "awq", "auto_awq", "awq_marlin", "modelopt", "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8"),
    "sglang": (*OURS, "fp8", "awq", *modelopt.METHODS),
    "transformers": (*OURS, "fp8", "awq"),
}
UNLOOKED: dict[str, tuple[str, ...]] = {
    "vllm": ("experts_int8", "gpt_oss_mxfp4", "humming", "inc", "moe_wna16", "mxfp4", "mxfp8", "quark", "torchao"),
    "sglang": (
        "auto-round-int8", "bitsandbytes", "blockwise_int8", "humming", "modelslim", "moe_wna16", "mxfp4", "mxfp8", "quark", "w4afp8", "w8a8_fp8", "w8a8_int8",
    ),
    "transformers": (
        "aqlm", "bitnet", "bitsandbytes", "eetq", "fbgemm_fp8", "fp_quant", "higgs", "hqq", "mxfp4", "mxfp8", "quanto", "quark", "spqr", "torchao", "vptq",
    ),
}  # fmt: skip
"""Methods with a reader of their own in the engine, and none here."""
SPOKEN = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}


def method_of(config: Mapping[str, Any]) -> str:
    """The method of a checkpoint; empty where it is not quantized."""
    quantization = config.get("quantization_config")
    if not quantization:
        return ""
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "bitsandbytes"
    return str(
        quantization.get("quant_method") or ("modelopt" if quantization.get("quant_algo") else "compressed-tensors")
    ).lower()


def reading(engine: str, config: Mapping[str, Any]) -> Reading:
    """What an engine does with the method of a checkpoint."""
    method = method_of(config)
    if engine == "sglang" and method in modelopt.METHODS and _mxfp8(config):
        return "unlooked"
    if not method or method in REPLAYED[engine]:
        return "replayed"
    if method in UNLOOKED[engine]:
        return "unlooked"
    return "ignored" if engine == "transformers" else "refused"


def _mxfp8(config: Mapping[str, Any]) -> bool:
    said = modelopt.read_modelopt(config["quantization_config"])
    return "MXFP8" in (said.algo, *said.layers.values())


def readers(method: str) -> str:
    """Who reads a method, for a person."""
    names = [SPOKEN[engine] for engine in SPOKEN if method in (*REPLAYED[engine], *UNLOOKED[engine])]
    return " and ".join(names)


def unread(engine: str, config: Mapping[str, Any]) -> Finding | None:
    """Why a file is not played through; None where it is."""
    found, method = reading(engine, config), method_of(config)
    who = SPOKEN[engine]
    others = readers(method)
    mend = f"use {others}" if others else "make the release again in a format that engines read: see docs/formats.md"
    if found == "refused":
        return Finding("refuses", SPOKEN[engine], f"{who} does not read {method!r}, and stops", mend, ())
    if found == "unlooked":
        what = f"{who} reads {method!r}, but how it would load this file was not played through: it cannot be told here"
        return Finding("unknown", SPOKEN[engine], what, "load it once in this engine, and look at what it reports", ())
    return None


def taken_for_plain(config: Mapping[str, Any], load: Load) -> Finding:
    """What comes of a quantized file that transformers takes for an unquantized one."""
    method = method_of(config)
    known = f"transformers does not read {method!r}: it warns, and loads the file as if it were not quantized; "
    others = readers(method)
    mend = f"use {others}" if others else "make the release again in a format that it reads: see docs/formats.md"
    if load.misfits:
        name, (stored, built) = next(iter(load.misfits.items()))
        what = f"{len(load.misfits)} tensors do not fit, {name} first ({list(stored)} into {list(built)}), and it stops"
        return Finding("refuses", load.model, known + what, mend, tuple(load.misfits))
    if load.casts:
        what = f"{len(load.casts)} weights are copied without their scales, {next(iter(load.casts))} first"
        return Finding("wrong", load.model, known + what, mend, tuple(load.casts))
    return Finding(
        "random", load.model, known + f"{len(load.unfilled)} parameters stay at random values", mend, tuple(load.unfilled)
    )
