"""The command line: exit codes, one message for each mistake, and JSON where tables are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qwench import cli
from qwench.demo import checkpoint
from tests.support.finetunes import write_finetune
from tests.support.tiny import write_tiny


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    monkeypatch.setattr(sys, "argv", ["qwench", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("cli") / "dense")


def test_recipes_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capsys, "recipes", "--json")
    assert code == 0
    assert {"nvfp4a16", "nvfp4a16-gdn", "int4"} <= json.loads(out).keys()


@pytest.mark.parametrize("which", ["dense", "moe"])
def test_inspect_knows_the_demo_checkpoints(
    which: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(which)  # type: ignore[arg-type]
    code, out, _ = call(monkeypatch, capsys, "inspect", str(folder), "--json", "--vram", "8")
    found = json.loads(out)
    assert code == 0
    assert (found["mtp"], found["vision"], found["complaints"]) == ("present", "present", [])
    assert found["bytes"] <= 16_000_000
    assert found["experts"] == ({} if which == "dense" else {"trunk": "fused", "mtp": "one by one"})
    assert sum(c["bytes"] for c in found["components"]) == found["bytes"]


def test_plan_as_table_and_as_json(dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capsys, "plan", "nvfp4a16", "--model", str(dense), "--json")
    data = json.loads(out)
    assert code == 0
    _, table, _ = call(monkeypatch, capsys, "plan", "nvfp4a16", "--model", str(dense))
    assert f"{data['quantized_tensors']} weights quantized" in table
    assert "mlp.gate" in table and "nvfp4 g16" in table


def test_a_lone_config_is_planned(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    code, out, _ = call(monkeypatch, capsys, "plan", "int4", "--model", str(tmp_path), "--json")
    _, whole, _ = call(monkeypatch, capsys, "plan", "int4", "--model", str(dense), "--json")
    assert code == 0
    assert json.loads(out)["bytes"] == json.loads(whole)["bytes"]


def test_a_run_as_json_is_its_record(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, "run", "int4", "--model", str(dense), "--out", str(tmp_path / "out"), "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "nvfp4a61", "--model", "MODEL"], "did you mean 'nvfp4a16'"),
        (["plan", "int4", "--model", "no/such/folder/here"], "neither a folder nor a hub id"),
        (["inspect", "EMPTY"], "config.json"),
        (["run", "int4", "--model", "MODEL", "--out", "TAKEN"], "not empty"),
        (["run", "int4", "--model", "PICKLE", "--out", "OUT"], "safetensors"),
        (["card", "MODEL"], "result.json"),
        (["verify", "MODEL", "--engine", "vlm"], "did you mean 'vllm'"),
        (["eval", "EMPTY", "--against", "MODEL"], "config.json"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str],
    expected: str,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("EMPTY", "TAKEN", "PICKLE"):
        (tmp_path / name).mkdir()
    (tmp_path / "TAKEN" / "mine.txt").write_text("mine")
    (tmp_path / "PICKLE" / "config.json").write_bytes((dense / "config.json").read_bytes())
    (tmp_path / "PICKLE" / "pytorch_model.bin").write_bytes(b"\x80")
    places = {"MODEL": dense, **{name: tmp_path / name for name in ("EMPTY", "TAKEN", "PICKLE", "OUT")}}
    code, _, err = call(monkeypatch, capsys, *(str(places.get(a, a)) for a in arguments))
    assert code == 2
    assert expected in err.replace("\n", " ")
    assert "mend:" in err
    assert "Traceback" not in err
    assert not (tmp_path / "OUT").exists()


def test_our_own_fault_is_exit_code_1_with_a_traceback(dense: Path) -> None:
    import subprocess

    code = "import qwench.recipe.load, sys; qwench.recipe.load.bundled = lambda: 1 / 0; sys.argv = ['qwench', 'plan', 'int4', '--model', 'x']; import qwench.cli; qwench.cli.main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr


def test_a_graft_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nacceptance: {documents: 2, length: 32}\nsteps:\n  - graft: {}\n  - export: {layout: text}\n")
    tuned = write_finetune(tmp_path / "tuned")
    code, out, _ = call(monkeypatch, capsys, "inspect", str(tuned))
    assert code == 0 and "lost: the MTP head is missing" in out
    code, _, err = call(monkeypatch, capsys, "plan", str(recipe), "--model", str(tuned))
    assert code == 2 and "recipe mine grafts mtp and names no donor" in err
    code, out, _ = call(monkeypatch, capsys, "plan", str(recipe), "--model", str(tuned), "--donor", "demo:dense", "--json")
    assert code == 0 and "MTP head grafted from" in json.loads(out)["notes"][0]
    made = ("run", str(recipe), "--model", str(tuned), "--donor", "demo:dense", "--out", str(tmp_path / "out"))
    code, out, _ = call(monkeypatch, capsys, *made)
    assert code == 0
    assert "MTP head  grafted mtp from demo:dense: 15 tensors" in out
    assert "of its first drafts are accepted, on its own" in out
    assert "of its first drafts accepted, " in out
    code, out, _ = call(monkeypatch, capsys, "inspect", str(tmp_path / "out"), "--json")
    found = json.loads(out)
    assert (found["mtp"], found["vision"], found["layout"]) == ("present", "none", "text-only causal LM")
