"""How an engine is started on a release: the one place that knows the options of vLLM, SGLang and llama.cpp. The card prints it, `qwench serve` prints and runs it.

What the options rest on:

- vLLM 0.32: parsers `qwen3` and `qwen3_coder` (its registries of reasoning and tool parsers), `--speculative-config` with method `mtp`;
- SGLang 0.5: the same names of parsers; NEXTN is its word for a head that the checkpoint brings (its cookbook for Qwen3.5);
- llama.cpp, September 2026: `--spec-type draft-mtp`; `--jinja` lets the model's own template speak, and the server finds reasoning and tool calls by it.

`bfloat16` is said everywhere: the intermediate values of Gated DeltaNet overflow float16, which engines choose for some formats.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from qwench.errors import EngineError

DRAFTS = 2
"""Tokens that the MTP head drafts for each forward of the trunk: what most pays without tuning, since acceptance falls with every position."""
ADAPTER = "eora"
"""What requests call the corrections."""
ENGINES = ("vllm", "sglang", "llama.cpp")


@dataclass(frozen=True)
class Launch:
    """What is to be served, and within which limits; what is None or empty is left to the engine.

    Attributes:
        name: folder or hub id; of llama.cpp, the path of the GGUF file.
        mtp: the release has an MTP head that is worth its time.
        tower: the `mmproj` file beside a GGUF file.
        drafter: a GGUF file that holds the MTP head alone.
        adapter, rank: folder of corrections (EoRA), and the largest of their ranks.
        reasoning, tools: what the chat template speaks of.
        context: tokens of the longest conversation.
        kv: dtype of the KV cache: `fp8_e4m3`.
        share: of the GPU's memory that the engine may take.
        gpu: layers go onto a GPU (llama.cpp must be told).
        host, port: where it listens.
    """

    name: str
    mtp: bool = False
    tower: str = ""
    drafter: str = ""
    adapter: str = ""
    rank: int = 0
    reasoning: bool = False
    tools: bool = False
    context: int | None = None
    kv: str | None = None
    share: float | None = None
    gpu: bool = True
    host: str = ""
    port: int | None = None


def arguments(engine: str, launch: Launch) -> list[str]:
    """The command, word by word. Raises EngineError for an engine that we know no command for."""
    if engine == "vllm":
        return _vllm(launch)
    if engine == "sglang":
        return _sglang(launch)
    if engine == "llama.cpp":
        return _llama_cpp(launch)
    raise EngineError(f"there is no launch command for {engine!r}", f"give --engine {', '.join(ENGINES)}")


def shell(words: Sequence[str], width: int = 100) -> str:
    """A command as a person types it: the program and what it serves in the first line, then a line for each two or three options, `width` characters at most where they fit."""
    lines, options = [""], _grouped(words)
    for option in options:
        text = " ".join(_quoted(word) for word in option)
        if lines[-1] and len(lines[-1]) + len(text) > width:
            lines.append("")
        lines[-1] += f" {text}" if lines[-1] else text
    return " \\\n  ".join(lines)


def _quoted(word: str) -> str:
    return f"'{word}'" if word.startswith("{") else shlex.quote(word)


def _grouped(words: Sequence[str]) -> list[list[str]]:
    """Options with their values."""
    groups: list[list[str]] = [[]]
    for word in words:
        if word.startswith("-") and groups[-1]:
            groups.append([])
        groups[-1].append(word)
    return groups


def _vllm(launch: Launch) -> list[str]:
    words = ["vllm", "serve", launch.name, "--dtype", "bfloat16"]
    words += ["--max-model-len", str(launch.context)] if launch.context else []
    words += ["--kv-cache-dtype", launch.kv] if launch.kv else []
    words += ["--gpu-memory-utilization", f"{launch.share:g}"] if launch.share else []
    words += ["--reasoning-parser", "qwen3"] if launch.reasoning else []
    words += ["--enable-auto-tool-choice", "--tool-call-parser", "qwen3_coder"] if launch.tools else []
    if launch.mtp:
        words += ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": DRAFTS})]
    if launch.adapter:
        words += [
            "--enable-lora",
            "--lora-modules",
            f"{ADAPTER}={launch.adapter}",
            "--max-lora-rank",
            str(_lora_rank(launch.rank)),
        ]
    return words + _listening(launch)


def _sglang(launch: Launch) -> list[str]:
    words = ["python", "-m", "sglang.launch_server", "--model-path", launch.name, "--dtype", "bfloat16"]
    words += ["--context-length", str(launch.context)] if launch.context else []
    words += ["--kv-cache-dtype", launch.kv] if launch.kv else []
    words += ["--mem-fraction-static", f"{launch.share:g}"] if launch.share else []
    words += ["--reasoning-parser", "qwen3"] if launch.reasoning else []
    words += ["--tool-call-parser", "qwen3_coder"] if launch.tools else []
    if launch.mtp:
        words += ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(DRAFTS)]
        words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(DRAFTS + 1)]
    if launch.adapter:
        words += ["--enable-lora", "--lora-paths", f"{ADAPTER}={launch.adapter}", "--max-lora-rank", str(launch.rank)]
    return words + _listening(launch)


def _llama_cpp(launch: Launch) -> list[str]:
    words = ["llama-server", "-m", launch.name]
    words += ["--mmproj", launch.tower] if launch.tower else []
    words += ["-ngl", "99"] if launch.gpu else []
    words += ["-fa", "on", "-c", str(launch.context or 8192)]
    words += ["-ctk", launch.kv, "-ctv", launch.kv] if launch.kv else []
    words += ["-np", "1"] if launch.context else []
    words += ["--jinja"] if launch.tools or launch.reasoning else []
    if launch.mtp:
        words += ["-md", launch.drafter] if launch.drafter else []
        words += ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(DRAFTS)]
    return words + _listening(launch)


def _listening(launch: Launch) -> list[str]:
    return (["--host", launch.host] if launch.host else []) + (["--port", str(launch.port)] if launch.port else [])


def _lora_rank(rank: int) -> int:
    """vLLM takes these and no others."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)
