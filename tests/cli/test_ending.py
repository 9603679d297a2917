"""How a run ends: a short table of what, where, how good and how to serve it, for every kind of release; plain lines, 80 columns wide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from qwench.cli import ending
from qwench.measuring import evaluate_release
from qwench.result import read_result
from tests.test_cli import call

QUICK = "acceptance: {documents: 2, length: 32}\n"
INT4 = f"name: quick\nabout: INT4 MLPs.\n{QUICK}steps:\n- quantize: {{rules: [{{roles: mlp.*, scheme: int4}}]}}\n- export\n"
GGUF = f"name: quick-gguf\nabout: Two files.\n{QUICK}steps:\n- export: {{format: gguf, types: [Q8_0, Q4_K_M], mmproj: BF16}}\n"
PRUNED = "name: half\nabout: Half of the experts.\nacceptance: off\ncalibration: {samples: 4, length: 64}\nsteps:\n- prune: {ratio: 0.5}\n- export\n"
TEXT = "name: text\nabout: Text alone.\nsteps:\n- export: {layout: text, drop: mtp}\n"


Ended = Callable[[str, str], str]


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ended:
    """Run a recipe on a carried checkpoint into ./out, and return what stands on the screen."""
    monkeypatch.chdir(tmp_path)

    def run(recipe: str, which: str) -> str:
        Path("mine.yaml").write_text(recipe)
        code, out, err = call(monkeypatch, capsys, "run", "mine.yaml", "--model", f"demo:{which}", "--out", "out")
        assert code == 0, err
        assert max(map(len, out.splitlines())) <= 80, out
        assert "\x1b" not in out, "no colours where nobody looks at a terminal"
        return out

    return run


def test_a_quantized_release(ended: Ended) -> None:
    out = ended(INT4, "dense")
    assert out.startswith("quick of demo:dense\n")
    assert "  what      INT4 MLPs.\n" in out
    assert "  where     out\n" in out
    assert "of its first drafts accepted" in out
    assert "  KL        not measured yet: qwench eval out --against demo:dense\n" in out
    assert "serve it\n  vllm serve out --dtype bfloat16" in out
    result = read_result(Path("out"))
    assert f", {result.bytes / result.source.bytes:.0%}\n" in out


def test_kl_stands_there_once_it_is_measured(ended: Ended, capsys: pytest.CaptureFixture[str]) -> None:
    ended(INT4, "dense")
    found = evaluate_release(Path("out"), "demo:dense", None, 2, 32)
    ending.show_ending(read_result(Path("out")), Path("out"), "demo:dense")
    mean = found.divergence.mean
    assert f"  KL        {mean.mean:.5f} ± {mean.standard_error:.5f} nats a token" in capsys.readouterr().out


def test_a_gguf_release_names_its_files_and_the_server_of_llama_cpp(ended: Ended) -> None:
    out = ended(GGUF, "dense")
    assert "  files     demo-dense-Q8_0.gguf: 8.34 MB" in out
    assert "            demo-dense-Q4_K_M.gguf: 4.97 MB" in out
    assert "  MTP head  Q8_0: " in out
    assert "            Q4_K_M: " in out
    assert "serve it\n  llama-server -m out/demo-dense-Q4_K_M.gguf" in out


def test_a_pruned_release_says_how_many_experts_went(ended: Ended) -> None:
    out = " ".join(ended(PRUNED, "moe").split())
    assert "experts 12 became 6 in each layer, ranked by reap; those that stay did" in out


def test_a_head_that_was_left_out_is_said_to_be(ended: Ended) -> None:
    out = ended(TEXT, "dense")
    assert "  MTP head  left out, as the recipe says\n" in out
    assert "speculative" not in out


def test_a_release_that_no_engine_can_hold_says_so(
    ended, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(TEXT, "dense")
    monkeypatch.setattr(ending, "gpu_memory", lambda: 2**20)
    ending.show_ending(read_result(Path("out")), Path("out"), "demo:dense")
    assert "serve it: " in capsys.readouterr().out


def test_a_terminal_gets_the_same_words_in_colour(
    ended, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ended(TEXT, "dense")
    terminal = Console(highlight=False, soft_wrap=True, force_terminal=True, color_system="standard", record=True, width=80)
    monkeypatch.setattr(ending, "out", terminal)
    ending.show_ending(read_result(Path("out")), Path("out"), "demo:dense")
    assert "\x1b[1m" in capsys.readouterr().out
    assert terminal.export_text().split() == plain.split()
