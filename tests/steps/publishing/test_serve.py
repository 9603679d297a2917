"""Launch commands: what is in them follows from the release and the memory; and one is started and spoken with over its OpenAI API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.errors import EngineError
from qwench.models.facts import RESERVE, facts
from qwench.recipe import load_recipe, parse_recipe
from qwench.result import Acceptance, read_result, write_result
from qwench.run import run_recipe
from qwench.steps.materials.material import shapes_of
from qwench.steps.publishing.launch import Launch, arguments, shell
from qwench.steps.publishing.serve import GIB, run_server, serving
from tests.steps.releases import estimate, evaluation
from tests.support.tiny import write_tiny

QUIET = Report("test", "bytes", None)
GGUF = "name: g\nsteps:\n  - export: {format: gguf, types: [Q8_0, Q4_K_M]}\nacceptance: off\n"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serve")
    source = write_tiny(place / "tiny")
    run_recipe(load_recipe("int4"), str(source), place / "out", 1, QUIET, accept_any=True)
    return place / "out"


@pytest.fixture(scope="module")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "gguf"
    run_recipe(parse_recipe(GGUF, "t"), "demo:dense", out, 1, QUIET)
    return out


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_every_engine_gets_its_own_words() -> None:
    launch = Launch(
        "org/r", mtp=True, reasoning=True, tools=True, context=4096, kv="fp8_e4m3", adapter="org/r/eora", rank=48, port=9
    )
    vllm = arguments("vllm", launch)
    assert vllm[:5] == ["vllm", "serve", "org/r", "--dtype", "bfloat16"]
    assert json.loads(value(vllm, "--speculative-config")) == {"method": "mtp", "num_speculative_tokens": 2}
    assert (value(vllm, "--reasoning-parser"), value(vllm, "--tool-call-parser")) == ("qwen3", "qwen3_coder")
    assert (value(vllm, "--max-lora-rank"), value(vllm, "--lora-modules")) == ("64", "eora=org/r/eora")
    assert (value(vllm, "--max-model-len"), value(vllm, "--kv-cache-dtype")) == ("4096", "fp8_e4m3")
    sglang = arguments("sglang", launch)
    assert (value(sglang, "--context-length"), value(sglang, "--speculative-num-draft-tokens")) == ("4096", "3")
    llama = arguments("llama.cpp", Launch("m.gguf", mtp=True, tower="mmproj.gguf", tools=True, context=512, kv="q8_0"))
    assert llama == [
        "llama-server",
        "-m",
        "m.gguf",
        "--mmproj",
        "mmproj.gguf",
        "-ngl",
        "99",
        "-fa",
        "on",
        "-c",
        "512",
        "-ctk",
        "q8_0",
        "-ctv",
        "q8_0",
        "-np",
        "1",
        "--jinja",
        "--spec-type",
        "draft-mtp",
        "--spec-draft-n-max",
        "2",
    ]
    with pytest.raises(EngineError, match="no launch command"):
        arguments("ollama", launch)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp"])
def test_what_is_printed_is_what_a_shell_reads(engine: str) -> None:
    words = arguments(engine, Launch("a folder/r", mtp=True, tools=True, reasoning=True, context=77, adapter="x y", rank=8))
    printed = shell(words)
    assert "\n" in printed
    said = subprocess.run(["sh", "-c", f"printf '%s\\0' {printed}"], capture_output=True, text=True, check=True).stdout
    assert said.split("\0")[:-1] == words


def test_the_context_is_the_longest_that_fits(release: Path) -> None:
    found = facts(shapes_of(str(release)))
    roomy = serving(release, "vllm", memory=8 * GIB)
    assert value(roomy.words, "--max-model-len") == str(found.context)
    assert "--kv-cache-dtype" not in roomy.words
    fixed = RESERVE + found.bytes + found.state_bytes()
    tight = int((fixed + found.kv_bytes(2000, mtp=True)) / 0.9) + 1000  # in BF16; twice as many in FP8
    words = serving(release, "vllm", memory=tight, context=3900).words
    assert (value(words, "--max-model-len"), value(words, "--kv-cache-dtype")) == ("3900", "fp8_e4m3")
    cut = serving(release, "vllm", memory=tight, context=9000)
    assert 3990 <= int(value(cut.words, "--max-model-len")) <= 4010
    assert any("9,000 tokens do not fit" in note for note in cut.notes)
    with pytest.raises(EngineError, match=r"does not fit 0\.5 GiB"):
        serving(release, "vllm", memory=GIB // 2)


def test_a_dead_head_is_not_asked_to_draft(release: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in release.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    result = read_result(copy)
    for accepted, drafts in ((0.6, True), (0.02, False)):
        result.evaluation = evaluation(acceptance_release=Acceptance(by_position=[estimate(accepted, 0.01)]))
        write_result(copy, result)
        served = serving(copy, "vllm", memory=GIB * 4)
        assert ("--speculative-config" in served.words) == drafts
        assert any(f"{accepted:.0%}" in note for note in served.notes)


def test_parsers_follow_the_template_and_lora_follows_the_folder(release: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in release.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    bare = serving(copy, "sglang", memory=GIB * 4).words
    assert not {"--reasoning-parser", "--tool-call-parser", "--enable-lora"} & set(bare)
    (copy / "chat_template.jinja").write_text("<think></think> {# no tools #}")
    (copy / "eora").mkdir()
    (copy / "eora" / "adapter_config.json").write_text('{"r": 16, "rank_pattern": {"a": 33}}')
    words = serving(copy, "vllm", memory=GIB * 4).words
    assert "--reasoning-parser" in words and "--tool-call-parser" not in words
    assert (value(words, "--lora-modules"), value(words, "--max-lora-rank")) == (f"eora={copy / 'eora'}", "64")
    assert "--speculative-config" not in words, "vLLM 0.32 is wrong with both"
    assert "--speculative-config" in serving(release, "vllm", memory=GIB * 4).words
    (copy / "chat_template.jinja").write_text("<tool_call>")
    assert "--tool-call-parser" in serving(copy, "sglang", memory=GIB * 4).words


def test_engines_and_files_that_do_not_go_together(release: Path, demo_gguf: Path) -> None:
    for place, engine in ((release, "llama.cpp"), (demo_gguf, "vllm")):
        with pytest.raises(EngineError, match="does not read"):
            serving(place, engine)
    with pytest.raises(EngineError, match="vllm, sglang"):
        serving(release, "ollama")
    served = serving(demo_gguf, file="demo-dense-Q8_0.gguf", memory=4 * GIB)
    assert value(served.words, "-m").endswith("Q8_0.gguf")
    assert Path(value(served.words, "--mmproj")).name.startswith("mmproj")
    assert value(served.words, "-ngl") == "99"
    assert value(serving(demo_gguf).words, "-m").endswith("Q4_K_M.gguf")
    assert "-ngl" not in serving(demo_gguf).words


def test_the_process_becomes_the_server(release: Path) -> None:
    seen: list[Any] = []
    absent = serving(release, "sglang", memory=GIB * 4)
    if not absent.here:  # it is nowhere where there is no GPU
        with pytest.raises(EngineError, match="not installed here"):
            run_server(absent)
    served = replace(absent, here=["/bin/engine", *absent.words[1:]], environment={"CACHE": "1"})
    run_server(served, lambda *given: seen.append(given))
    program, words, environment = seen[0]
    assert program == "/bin/engine" and words[1:] == served.words[1:]
    assert environment == {**os.environ, "CACHE": "1"}

    def missing(*_: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    with pytest.raises(EngineError, match="cannot be started"):
        run_server(served, missing)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ask(url: str, question: dict[str, Any] | None = None) -> Any:
    data = json.dumps(question).encode() if question else None
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def wait_for(url: str, process: subprocess.Popen[Any], seconds: float) -> None:
    """Until a server answers. Raises TimeoutError; the test fails where the process dies."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended with code {process.returncode}"
        try:
            ask(url)
            return
        except (urllib.error.URLError, ConnectionError, ValueError):
            time.sleep(0.5)
    raise TimeoutError


@pytest.mark.engine("llama.cpp")
def test_a_server_that_was_started_answers_over_the_openai_api(demo_gguf: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "qwench", "serve", str(demo_gguf), "--run", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/health", process, 120)
        models = ask(f"{url}/v1/models")
        assert len(models["data"]) == 1
        question = {"messages": [{"role": "user", "content": "def add(a, b):"}], "max_tokens": 12, "temperature": 0}
        answer = ask(f"{url}/v1/chat/completions", question)
        assert answer["usage"]["completion_tokens"] == 12
        completed = ask(f"{url}/v1/completions", {"prompt": "import ", "max_tokens": 8, "temperature": 0})
        assert completed["choices"][0]["text"]
        assert completed["timings"]["draft_n"] > 0, "the MTP head drafts in the server, as the command says"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.engine("vllm")
def test_vllm_serves_the_demo(tmp_path: Path) -> None:
    """The environment of `make engines`, on processors: two minutes to start on a busy machine."""
    served = serving(checkpoint("dense"), "vllm", port=free_port(), context=256)
    if not served.here:
        pytest.skip("there is no vLLM here (make engines)")
    environment = {**os.environ, **served.environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*served.here, "--enforce-eager"], stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{value(served.words, '--port')}"
    try:
        wait_for(f"{url}/v1/models", process, 300)
        question = {"model": str(checkpoint("dense")), "prompt": "import ", "max_tokens": 8, "temperature": 0}
        assert ask(f"{url}/v1/completions", question)["usage"]["completion_tokens"] == 8
    except TimeoutError:
        pytest.skip("vLLM did not start within five minutes on this machine")
    finally:
        process.terminate()
        process.wait(60)


def test_a_release_without_a_head_is_served_without_drafts(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny", mtp=None)
    served = serving(source, "vllm", memory=4 * GIB)
    assert "--speculative-config" not in served.words
