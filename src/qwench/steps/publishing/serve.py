"""The launch of one release on one machine: what fits its memory, whether the MTP head is worth its time, what the chat template speaks of.

Memory is counted as `qwench inspect --vram` counts it: weights as stored, the recurrent states, a cache of keys and values for every position, and a reserve. The
longest context that the model was made for is tried first with the cache in BF16, then in FP8 (8 bits for llama.cpp); where neither fits, the longest that does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwench.checkpoint.folder import read_config
from qwench.checkpoint.reader import Checkpoint
from qwench.engines.environments import home
from qwench.engines.llama_cpp import PACKAGE
from qwench.errors import CheckpointError, EngineError, suggestion
from qwench.formats.adapter import CONFIG_NAME as ADAPTER_CONFIG
from qwench.formats.adapter import FOLDER as ADAPTER_FOLDER
from qwench.formats.gguf_source import GgufSource
from qwench.models.facts import RESERVE, Facts, KvDtype, facts
from qwench.result import FILE_NAME, Result, read_result
from qwench.steps.cards.engines import known_trouble
from qwench.steps.gguf.verify import files_to_verify, is_gguf
from qwench.steps.heads.gate import first_position
from qwench.steps.publishing.launch import ENGINES, Launch, arguments

GIB = 2**30
SHARE = {"vllm": 0.9, "sglang": 0.85}
"""Of a GPU's memory, what is left to the engine; the rest is graphs and what PyTorch keeps."""
EIGHT_BITS = {"vllm": "fp8_e4m3", "sglang": "fp8_e4m3", "llama.cpp": "q8_0"}
ALIVE = 0.1
"""Acceptance at position 1 under which drafting costs more than it brings."""
PROCESSOR = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""What vLLM needs on processors: GiB for the cache, of which it would take half of the memory, and threads that share their cores with others."""
BEST = ("Q4_K_M", "Q6_K", "Q8_0")
"""GGUF types to serve where no file is named, in this order."""


@dataclass(frozen=True)
class Served:
    """What starts a release.

    Attributes:
        words: the command, as it is everywhere.
        here: the same with the program that this machine has; empty where it has none.
        environment: variables that it needs here.
        notes: what a person should know.
    """

    engine: str
    words: list[str]
    here: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def serving(
    release: Path, engine: str | None = None, file: str | None = None, memory: int | None = None, context: int | None = None,
    host: str = "", port: int | None = None,
) -> Served:  # fmt: skip
    """The command for a release.

    Args:
        engine: one of `ENGINES`; None: llama.cpp for GGUF, else vLLM.
        file: of a GGUF release; None: the first there is of `BEST`.
        memory: bytes of the GPU; None where there is no GPU.
        context: tokens wanted; None: as many as the model was made for and the memory allows.

    Raises:
        CheckpointError: no release there.
        EngineError: an engine that cannot read it, or a release that does not fit the memory.
    """
    made_of_gguf = is_gguf(release)
    engine = engine or ("llama.cpp" if made_of_gguf else "vllm")
    if engine not in ENGINES:
        raise EngineError(
            f"no engine {engine!r} can be served{suggestion(engine, ENGINES)}", f"give --engine {', '.join(ENGINES)}"
        )
    if made_of_gguf != (engine == "llama.cpp"):
        what = f"{engine} does not read {'GGUF files' if made_of_gguf else 'folders of safetensors files'}"
        raise EngineError(what, f"give --engine {'llama.cpp' if made_of_gguf else 'vllm or sglang'}")
    folder = release.parent if release.suffix == ".gguf" else release
    record = read_result(folder) if (folder / FILE_NAME).is_file() else None
    launch, found, weights = _gguf(release, file) if made_of_gguf else _safetensors(release)
    alive, notes = _alive(found, record, made_of_gguf and bool(launch.drafter))
    if engine == "vllm" and alive and launch.adapter:
        alive = False
        notes = [
            "vLLM 0.32 computes wrong numbers where it drafts and adapters are on: the MTP head is left out, take eora/ away to draft"
        ]
    template = _template(folder)
    launch = replace(launch, mtp=alive, host=host, port=port, reasoning="</think>" in template, tools="<tool_call>" in template)
    launch, fitting = _fitted(launch, engine, found, weights, memory, context)
    trouble = known_trouble(engine, record) if record else ""
    words = arguments(engine, launch)
    here, environment, said = _program(engine, words, memory)
    return Served(engine, words, here, environment, [*([trouble] if trouble else []), *notes, *fitting, *said])


def _safetensors(release: Path) -> tuple[Launch, Facts, int]:
    found = facts(Checkpoint.open(release))
    adapter = release / ADAPTER_FOLDER / ADAPTER_CONFIG
    if not adapter.is_file():
        return Launch(str(release)), found, found.bytes
    return Launch(str(release), adapter=str(adapter.parent), rank=_rank(adapter)), found, found.bytes


def _rank(path: Path) -> int:
    """The largest rank of an adapter. Raises CheckpointError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return max([int(config["r"]), *map(int, config.get("rank_pattern", {}).values())])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is no adapter's config: {error}", "make the release again") from None


def _gguf(release: Path, file: str | None) -> tuple[Launch, Facts, int]:
    files = files_to_verify(release, file)
    chosen = next((p for kind in BEST for p in files if p.stem.endswith(kind)), files[0])
    tower = next(iter(sorted(chosen.parent.glob("mmproj*.gguf"))), None)
    drafter = next(iter(sorted(chosen.parent.glob("mtp-*.gguf"))), None)
    found = facts(GgufSource(chosen, read_config(chosen.parent)))
    launch = Launch(str(chosen), tower=str(tower or ""), drafter="" if found.mtp == "present" else str(drafter or ""))
    besides = [path for path in (tower, drafter if launch.drafter else None) if path]
    return launch, found, sum(path.stat().st_size for path in (chosen, *besides))


def _alive(found: Facts, record: Result | None, drafter: bool) -> tuple[bool, list[str]]:
    """Whether the head is worth drafting with, and what to say about it."""
    if found.mtp != "present" and not drafter:
        lost = found.mtp == "missing"
        return False, ["the config announces an MTP head and none is stored: no speculation"] if lost else []
    sides = [record.evaluation.acceptance_release] if record and record.evaluation else []
    sides += [record.acceptance.release] if record and record.acceptance else []
    measured = next((first_position(side) for side in sides if side), None)
    if measured is None:
        return True, ["the acceptance of the MTP head was not measured: `qwench eval` does"]
    if measured < ALIVE:
        return False, [f"the MTP head's drafts are accepted in {measured:.0%} of all cases: it is left out"]
    return True, [f"the MTP head drafts: {measured:.0%} accepted at position 1"]


def _template(folder: Path) -> str:
    """The chat template, or the file that holds it."""
    path = folder / "chat_template.jinja"
    found = path if path.is_file() else folder / "tokenizer_config.json"
    return found.read_text(encoding="utf-8", errors="replace") if found.is_file() else ""


def _fitted(
    launch: Launch, engine: str, found: Facts, weights: int, memory: int | None, context: int | None
) -> tuple[Launch, list[str]]:
    """The launch with context, cache and share that fit. Raises EngineError where not even the weights do."""
    if memory is None:
        unseen = "no GPU is seen here: context and cache are left to the engine; --vram GIB says what another machine has"
        return replace(
            launch, gpu=False, context=context or (min(found.context or 8192, 8192) if engine == "llama.cpp" else None)
        ), [unseen]
    usable = int(memory * SHARE.get(engine, 1.0))
    wanted = context or found.context or 32768
    longest = {kv: _longest(found, usable, weights, kv, launch.mtp) for kv in ("bfloat16", "fp8_e4m3")}
    if longest["fp8_e4m3"] is None or longest["fp8_e4m3"] < 1024:
        raise EngineError(
            f"the release does not fit {memory / GIB:.1f} GiB: weights take {weights / GIB:.2f} GiB, "
            f"states {found.state_bytes() / GIB:.2f}, the engine about {RESERVE / GIB:.0f}, and {engine} gets {usable / GIB:.1f}",
            "give a larger GPU with --vram, or make a smaller release",
        )
    wide = (longest["bfloat16"] or 0) >= wanted
    given = wanted if wide else min(wanted, longest["fp8_e4m3"])
    kv: KvDtype = "bfloat16" if wide else "fp8_e4m3"
    said = [
        f"{memory / GIB:.0f} GiB: weights {weights / GIB:.2f} GiB, cache of {given:,} tokens in {'BF16' if wide else '8 bits'} "
        f"{found.kv_bytes(given, dtype=kv, mtp=launch.mtp) / GIB:.2f} GiB"
    ]
    if given < wanted:
        said.append(f"{wanted:,} tokens do not fit: {given:,} do")
    return replace(launch, context=given, kv=None if wide else EIGHT_BITS[engine], share=SHARE.get(engine)), said


def _longest(found: Facts, memory: int, weights: int, kv: KvDtype, mtp: bool) -> int | None:
    """Tokens of one conversation beside the weights as these files hold them; None where not even they fit."""
    left = memory - RESERVE - weights - found.state_bytes()
    return None if left < 0 else left // found.kv_bytes(1, dtype=kv, mtp=mtp)


def _program(engine: str, words: list[str], memory: int | None) -> tuple[list[str], dict[str, str], list[str]]:
    """The command with the program that this machine has: (words, environment, notes)."""
    if engine != "sglang" and (found := shutil.which(words[0])):
        return [found, *words[1:]], {}, []
    if engine == "vllm" and (own := home() / "vllm" / "bin" / "python").is_file():
        # the command `vllm` of the build for processors looks for a package of another name, and ends
        server = [str(own), "-m", "vllm.entrypoints.openai.api_server", "--model", *words[2:]]
        if memory is None:  # its cache of prefixes moves recurrent states by a kernel that processors have not
            server.append("--no-enable-prefix-caching")
        return server, PROCESSOR if memory is None else {}, [f"--run starts {own}, whose vLLM is made for processors"]
    if engine == "llama.cpp" and _installed(PACKAGE):
        return (
            [sys.executable, "-m", "qwench.engines.workers.llama_server", *words[1:]],
            {},
            [f"--run starts the server of {PACKAGE}"],
        )
    if engine == "sglang" and _installed("sglang"):
        return [sys.executable, *words[1:]], {}, []
    return [], {}, [f"{engine} is not installed here"]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run_server(served: Served, execute: Callable[[str, list[str], dict[str, str]], None] = os.execvpe) -> None:
    """Become the server: this process is replaced. Raises EngineError where there is no such program, or it cannot be started."""
    if not served.here:
        raise EngineError(f"{served.engine} is not installed here", "install it, or take the command to where it is")
    try:
        execute(served.here[0], served.here, {**os.environ, **served.environment})
    except OSError as error:
        raise EngineError(
            f"{served.here[0]} cannot be started: {error.strerror}", "mend its permissions, or install it again"
        ) from None
