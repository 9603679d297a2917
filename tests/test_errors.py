"""Unknown names of every kind are told with the nearest one that exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.errors import suggestion, suggestion_beside
from tests.test_cli import call

MODEL = "demo:dense"
RECIPE = """
name: mine
steps:
  - quantize:
      rules:
        - {roles: [ROLE], scheme: int4}
  - export: {}
"""


def test_the_nearest_name_whatever_its_case() -> None:
    assert suggestion("NVPF4", ["int4", "nvfp4"]) == " (did you mean 'nvfp4'?)"
    assert suggestion("q4_k_m", ["Q8_0", "Q4_K_M"]) == " (did you mean 'Q4_K_M'?)"
    assert suggestion("banana", ["int4", "nvfp4"]) == ""
    assert suggestion("int4", []) == ""


def test_the_nearest_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    assert suggestion_beside(tmp_path / "mien.yaml") == " (did you mean 'mine.yaml'?)"
    assert suggestion_beside(tmp_path / "absent" / "mien.yaml") == ""


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["plan", "NVFP4A61", "--model", MODEL], "nvfp4a16"),
        (["plan", "FOLDER/mien.yaml", "--model", MODEL], "mine.yaml"),
        (["plan", "int4", "--model", "demo:dnse"], "dense"),
        (["plan", "int4", "--model", "FOLDER/Qwen-9b"], "Qwen-9B"),
        (["run", "int4", "--model", MODEL, "--out", "OUT", "--compute", "bfloat"], "bfloat16"),
        (["run", "int4", "--model", MODEL, "--out", "OUT", "--device", "cudaa"], "cuda"),
        (["run", "nvfp4-w4a4", "--model", MODEL, "--out", "OUT", "--calibration", "wikitxt"], "wikitext"),
        (["run", "nvfp4-w4a4", "--model", MODEL, "--out", "OUT", "--calibration", "caried"], "carried"),
        (["run", "nvfp4-w4a4", "--model", MODEL, "--out", "OUT", "--calibration", "FOLDER/note.txt"], "notes.txt"),
        (["verify", MODEL, "--engine", "transfromers"], "transformers"),
        (["verify", MODEL, "--engine", "sglan", "--offline"], "sglang"),
        (["serve", MODEL, "--engine", "vlm"], "vllm"),
        (["eval", MODEL, "--against", MODEL, "--tasks", "x.yaml", "--engine", "vlm"], "vllm"),
        (["verify", "FOLDER/gguf", "--file", "mine-Q8.gguf"], "mine-Q8_0.gguf"),
        (["serve", "FOLDER/gguf", "--file", "mine-Q8.gguf"], "mine-Q8_0.gguf"),
        (["verify", "FOLDER/gguf/mine-Q80.gguf"], "mine-Q8_0.gguf"),
        (["recipe"], "recipes"),
        (["plan", "int4", "--modle", MODEL], "--model"),
    ],
)
def test_every_unknown_name_suggests_the_nearest(
    arguments: list[str], nearest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "Qwen-9B").mkdir()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "mine-Q8_0.gguf").touch()
    places = {"OUT": str(tmp_path / "out")}
    words = [places.get(word, word.replace("FOLDER", str(tmp_path))) for word in arguments]
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2
    assert "did you mean" in err.lower() or "Possible options" in err
    assert nearest in " ".join(err.split()).lower() or nearest in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("role", "nearest"),
    [
        ("mlp.gat", "mlp.gate"),
        ("atention.q", "attention.q"),
        ("q_proj", "attention.q"),
        ("'model.layers.*.mlp.gate_proj'", "mlp.gate"),
        ("lm_head", "head"),
        ("'mtp.layers.0.self_attn.o_proj'", "mtp.attention.o"),
    ],
)
def test_an_unknown_role_suggests_the_nearest_and_knows_the_names_of_modules(
    role: str, nearest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.replace("ROLE", role))
    code, _, err = call(monkeypatch, capsys, "plan", str(recipe), "--model", MODEL)
    assert code == 2
    assert f"did you mean '{nearest}" in err


def test_an_unknown_gguf_type_suggests_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nsteps:\n  - export: {format: gguf, types: q4_k_mm, overrides: [{roles: mtp.*, type: q8}]}\n")
    code, _, err = call(monkeypatch, capsys, "plan", str(recipe), "--model", MODEL)
    assert code == 2
    assert "did you mean 'Q4_K_M'" in err
    assert "did you mean 'Q8_0'" in err
