"""Benchmarks through lm-eval, offline, on a task of our own: real engines, the numbers of the engine itself, and errors that pair documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.engines import llama_cpp
from qwench.engines.base import Request
from qwench.errors import EngineError, TextError
from qwench.recipe import load_recipe, parse_recipe
from qwench.result import read_result
from qwench.run import run_recipe
from qwench.steps.cards.card import write_card
from qwench.steps.measures.tasks import Asked, check, places, put_on_record, read_task, recovery, run_tasks, scores, without
from tests.steps.releases import estimate

pytest.importorskip("lm_eval", reason='lm-eval is not installed (pip install "qwench[tasks]")')

TASK = Path(__file__).parents[2] / "data" / "tasks" / "python_lines.yaml"
QUIET = Report("test", "bytes", None)
GGUF = "name: g\nsteps:\n  - export: {format: gguf, types: [BF16, Q4_K_M], mmproj: none}\nacceptance: off\n"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tasks") / "gguf"
    run_recipe(parse_recipe(GGUF, "t"), "demo:dense", out, 1, QUIET)
    return out


def qwench(*words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "qwench", *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_transformers_offline_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_recipe(load_recipe("int4"), "demo:dense", out, 1, QUIET, accept_any=True)
    said = json.loads(
        qwench("eval", str(out), "--against", "demo:dense", "--tasks", str(TASK), "--engine", "transformers", "--json")
    )
    (found,) = said
    assert (found["task"], found["metric"], found["samples"], found["engine"]) == ("python_lines", "acc", 16, "transformers")
    assert 0.5 <= found["source"]["mean"] < 1 and found["source"]["standard_error"] > 0.05
    assert found["recovery"]["mean"] == pytest.approx(found["release"]["mean"] / found["source"]["mean"])
    assert found["difference"]["mean"] == pytest.approx(found["release"]["mean"] - found["source"]["mean"])
    result = read_result(out)
    assert [score.model_dump(mode="json") for score in result.tasks] == said
    put_on_record(out, result.tasks)
    assert len(read_result(out).tasks) == 1, "a second measurement takes the place of the first"
    write_card(out)
    for name in ("README.md", "report.html"):
        text = (out / name).read_text(encoding="utf-8")
        assert "python_lines" in text and "Benchmarks" in text and "lm-eval" in text, name


@pytest.mark.engine("llama.cpp")
def test_llama_cpp_scores_what_its_log_probabilities_say(gguf: Path) -> None:
    rows = [[5, 17, 250, 31, 99, 8], [44, 3, 12, 9, 61, 7]]
    path = gguf / "demo-dense-Q4_K_M.gguf"
    answer = llama_cpp.run(Request(path, rows, generate=1, image=False))
    for (value, greedy), row, (_, logprobs), start in zip(
        llama_cpp.scores(path, [*rows, rows[0][:3]], [2, 5, 1])[:2], rows, answer.logprobs, [2, 5], strict=True
    ):
        assert value == pytest.approx(sum(float(logprobs[t - 1, row[t]]) for t in range(start, len(row))), abs=1e-3)
        assert greedy == all(int(np.argmax(logprobs[t - 1])) == row[t] for t in range(start, len(row)))
    with pytest.raises(EngineError, match="ended with code"):
        llama_cpp.scores(TASK, rows, [1, 1])


@pytest.mark.engine("llama.cpp")
def test_llama_cpp_and_transformers_choose_alike(gguf: Path) -> None:
    """The unquantized file against the checkpoint that it was made from: the same answers, document by document."""
    task = [read_task(str(TASK))]
    one = run_tasks(gguf / "demo-dense-BF16.gguf", task, Asked([str(TASK)], "llama.cpp"))
    other = run_tasks(checkpoint("dense"), task, Asked([str(TASK)], "transformers"))
    (score,) = scores(one, other, Asked([str(TASK)], "llama.cpp"), None)
    assert score.difference == estimate(0, 0) and score.recovery == estimate(1, 0)
    assert score.samples == 16


def results(values: list[float], metric: str = "acc", upwards: bool = True) -> dict[str, Any]:
    samples = [{"doc_id": i, metric: v, "filter": "none"} for i, v in enumerate(values)]
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)
    return {
        "results": {"t": {"alias": "t", f"{metric},none": mean, f"{metric}_stderr,none": error}}, "samples": {"t": samples},
        "n-samples": {"t": {"effective": len(values)}}, "n-shot": {"t": 3}, "higher_is_better": {"t": {metric: upwards}},
    }  # fmt: skip


def test_errors_pair_the_documents() -> None:
    source, release = [1.0, 1, 0, 1, 0, 1, 1, 0], [1.0, 1, 0, 1, 0, 1, 0, 0]
    (found,) = scores(results(release), results(source), Asked(["t"], "vllm"), "a.gguf")
    assert found.difference is not None and found.recovery is not None
    assert found.difference.mean == -1 / 8
    assert found.difference.standard_error == pytest.approx(np.std([0] * 7 + [-1], ddof=1) / 8**0.5)
    assert found.difference.standard_error < found.source.standard_error
    assert found.recovery.mean == pytest.approx(4 / 5)
    assert found.recovery.standard_error == pytest.approx(found.difference.standard_error / 0.625)
    assert (found.few_shot, found.samples, found.file) == (3, 8, "a.gguf")
    (loss,) = scores(results(release, "ppl", False), results(source, "ppl", False), Asked(["t"], "vllm"), None)
    assert loss.recovery is None, "a perplexity is not recovered"
    one, other = results(release), results(source)
    other["samples"]["t"].pop()
    (unpaired,) = scores(one, other, Asked(["t"], "vllm"), None)
    assert unpaired.difference is None and unpaired.recovery is not None
    assert unpaired.recovery.standard_error > found.recovery.standard_error
    assert recovery(estimate(0.1, 0.1), estimate(0, 0.1), None) is None


def test_what_cannot_be_asked_is_told(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="transformers, vllm"):
        check(Asked(["t"], "sglang"))
    with pytest.raises(TextError, match="no task"):
        check(Asked([], "vllm"))
    with pytest.raises(EngineError, match="does not read GGUF"):
        places(gguf, checkpoint("dense"), "transformers")
    assert [p.name for p in places(gguf, checkpoint("dense"), "llama.cpp")] == [
        "demo-dense-Q4_K_M.gguf",
        "demo-dense-BF16.gguf",
    ]
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "m-Q4_K_M.gguf").write_bytes(b"")
    with pytest.raises(EngineError, match="no unquantized GGUF"):
        places(lone, checkpoint("dense"), "llama.cpp")
    for text, said in (("a: [", "not plain YAML"), ("f: !function x.y", "not plain YAML"), ("a: 1", "names no task")):
        (tmp_path / "t.yaml").write_text(text)
        with pytest.raises(TextError, match=said):
            read_task(str(tmp_path / "t.yaml"))
    (tmp_path / "t.yaml").write_text("task: t\ndataset_kwargs: {data_files: {test: absent.jsonl}}")
    with pytest.raises(TextError, match="absent"):
        read_task(str(tmp_path / "t.yaml"))
    assert read_task("hellaswag") == "hellaswag"
    assert without(["a", "--x", "1", "b"], "--x") == ["a", "b"] == without(["a", "b"], "--x")


@pytest.mark.engine("vllm")
def test_vllm_chooses_as_transformers_does() -> None:
    """Over the server that `qwench serve` starts: a minute or two on processors."""
    task = [read_task(str(TASK))]
    one, other = (run_tasks(checkpoint("dense"), task, Asked([str(TASK)], engine)) for engine in ("vllm", "transformers"))
    (score,) = scores(one, other, Asked([str(TASK)], "vllm"), None)
    assert score.difference == estimate(0, 0) and score.samples == 16
