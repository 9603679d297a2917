"""The Python of a card does what it says: it is run, word by word as it stands on the card of a release that was verified, by the engine that it is for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.engines import auto_round, gptqmodel
from qwench.recipe import parse_recipe
from qwench.result import Result, read_result, write_result
from qwench.run import run_recipe
from qwench.steps.cards.card import write_card
from qwench.steps.cards.engines import engine_sections, launch_command
from qwench.steps.cards.snippets import gptqmodel_snippet
from tests.steps.releases import release, verification, weight

QUIET = Report("test", "bytes", None)
INT4 = "quantize: {rules: [{roles: [attention.*, delta.qkv, delta.z, delta.out, mlp.*], scheme: int4}]}"
RECIPES = {
    "compressed-tensors": f"steps:\n  - {INT4}\n  - export: {{}}\n",
    "auto-round": f"steps:\n  - {INT4}\n  - export: {{format: auto-round}}\n",
    "gptq": f"steps:\n  - {INT4}\n  - correct: {{rank: 8}}\n  - export: {{format: gptq, layout: text}}\ncalibration: {{samples: 3, length: 64}}\n",
}
"""GPTQModel loads a processor of images with every model that has a tower, and its environment has no torchvision: text alone."""
CORRECTED = 8 // 4 * 4 + 6 * 3 + 8 * 3
"""Quantized weights of the dense demo: attention of 2 layers, Gated DeltaNet of 6, MLPs of 8."""


def made_release(kind: str, folder: Path) -> Path:
    """A release of the dense demo in one container, with a record that says that its engine agrees with it."""
    run_recipe(parse_recipe(f"name: t\nacceptance: off\n{RECIPES[kind]}", "t"), str(checkpoint("dense")), folder, 1, QUIET)
    engine = {"compressed-tensors": "transformers", "gptq": "gptqmodel"}.get(kind, kind)
    result = read_result(folder)
    result.verifications = [verification(engine, "agrees", adapter=way) for way in ("eora", None) if not way or kind == "gptq"]
    write_result(folder, result)
    return folder


def snippets(folder: Path) -> list[str]:
    """The Python on a release's card."""
    return re.findall(r"```python\n(.*?)\n```", write_card(folder).read_text(encoding="utf-8"), re.S)


def answer(python: Path | str, snippet: str, folder: Path) -> tuple[str, str]:
    """What a snippet prints when it is run beside the release, and everything that it said."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "GPTQMODEL_CPU_WORKERS": str(gptqmodel.WORKERS),
    }
    done = subprocess.run(
        [str(python), "-c", snippet], cwd=folder.parent, env=os.environ | settings, capture_output=True, text=True, timeout=540
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    _, _, said = done.stdout.rpartition("<|im_start|>user\nWhat does a quantized model trade away?<|im_end|>")
    return said.partition("</think>")[2].strip(), done.stdout + done.stderr


def test_transformers_runs_what_the_card_says(tmp_path: Path) -> None:
    folder = made_release("compressed-tensors", tmp_path / "release")
    (snippet,) = snippets(folder)
    assert "AutoModelForImageTextToText" in snippet
    said, _ = answer(sys.executable, snippet, folder)
    assert len(said) > 5


@pytest.mark.engine("auto-round")
def test_auto_round_runs_what_the_card_says(tmp_path: Path) -> None:
    folder = made_release("auto-round", tmp_path / "release")
    (snippet,) = snippets(folder)
    assert snippet.startswith("# pip install auto-round\n")
    said, _ = answer(auto_round.python(), snippet, folder)
    assert len(said) > 5


@pytest.mark.engine("gptqmodel")
def test_gptqmodel_runs_what_the_card_says_with_and_without_corrections(tmp_path: Path) -> None:
    folder = made_release("gptq", tmp_path / "release")
    without, corrected = snippets(folder)
    assert "torchvision" not in without + corrected
    said, _ = answer(gptqmodel.python(), without, folder)
    also, everything = answer(gptqmodel.python(), corrected, folder)
    assert len(said) > 5 and len(also) > 5
    assert "Lora" not in without and f"`{CORRECTED}` EoRA" in everything, "every quantized weight has its correction"


def engine_titles(result: Result) -> list[str]:
    return [section["title"] for section in engine_sections(result, "r")]


def exported(container: str, rank: int = 0) -> dict[str, object]:
    steps = [{"quantize": {}}, *([{"correct": {"rank": rank}}] if rank else []), {"export": {"format": container}}]
    return {"name": "t", "steps": steps}


def test_each_container_names_its_natural_engines_first() -> None:
    assert engine_titles(release()) == ["vLLM", "Transformers", "SGLang"]
    assert engine_titles(release(recipe=exported("auto-round"))) == ["auto-round", "vLLM", "SGLang"]
    asked = release(recipe=exported("gptq"), verifications=[verification("transformers", "failed")])
    assert engine_titles(asked) == ["GPTQModel", "vLLM", "SGLang", "Transformers"]


def test_corrections_have_commands_of_their_own() -> None:
    found = [verification(engine, "agrees", adapter=adapter) for engine in ("vllm", "gptqmodel") for adapter in ("eora", None)]
    given = release(
        recipe=exported("gptq", rank=48),
        verifications=[*found, verification("auto-round", "agrees")],
        errors=[weight("mlp.up", 0, "int4 g128")],
    )
    sections = {section["title"]: section for section in engine_sections(given, "r")}
    assert list(sections) == [
        *("GPTQModel, without the corrections", "GPTQModel, with the corrections"), *("vLLM, without the corrections", "vLLM, with the corrections"),
        *("SGLang, without the corrections", "SGLang, with the corrections"), "auto-round, without the corrections",
    ]  # fmt: skip
    alone, both = (sections[f"vLLM, {way} the corrections"]["command"] for way in ("without", "with"))
    assert "--speculative-config" in alone and "--enable-lora" not in alone
    assert "--speculative-config" not in both and "--lora-modules eora=r/eora" in both and "--max-lora-rank 64" in both
    assert 'Lora(path="r/eora", rank=48)' in sections["GPTQModel, with the corrections"]["command"]
    assert (
        sections["SGLang, with the corrections"]["command"] is None
        and sections["SGLang, with the corrections"]["status"] == "Not verified."
    )


def test_only_what_was_verified_with_corrections_gets_their_command() -> None:
    given = release(
        recipe=exported("gptq", rank=48),
        verifications=[verification("vllm", "agrees")],
        errors=[weight("mlp.up", 0, "int4 g128")],
    )
    sections = {section["title"]: section for section in engine_sections(given, "r")}
    assert sections["vLLM, without the corrections"]["command"] and not sections["vLLM, with the corrections"]["command"]


def test_snippets_are_python_and_say_what_they_need() -> None:
    for rank in (0, 16):
        for vision in (False, True):
            snippet = gptqmodel_snippet("me/release", vision, rank)
            compile(snippet, "snippet", "exec")
            assert ("torchvision" in snippet) == vision and ("Lora" in snippet) == bool(rank)
    for engine in ("transformers", "auto-round", "gptqmodel"):
        found = launch_command(engine, release(), "me/release")
        assert found is not None and found[1] == "python"
        compile(found[0], "snippet", "exec")
    assert launch_command("llama.cpp", release(), "r") is None
