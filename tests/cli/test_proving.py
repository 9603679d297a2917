"""`qwench run --measure`: the whole job in one command, and what it does where an engine is missing or reads the file otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwench import cli
from qwench.engines import ENGINES, Request
from qwench.errors import EngineError
from qwench.result import read_result
from qwench.steps.checks import verify
from qwench.steps.checks.natural import natural_engine


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["qwench", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_one_command_makes_verifies_measures_and_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "run", "int4", "--model", "demo:dense", "--out", str(out), "--measure", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    record = read_result(out)
    assert told["evaluation"]["divergence"]["mean"]["mean"] == record.evaluation.divergence.mean.mean > 0  # type: ignore[union-attr]
    assert [v.engine for v in record.verifications] == ["transformers"]
    assert (out / "README.md").is_file() and (out / "report.html").is_file()


def test_an_engine_that_is_not_there_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(request: Request) -> None:
        raise EngineError("transformers is not installed", "make engines")

    monkeypatch.setitem(ENGINES, "transformers", absent)
    out = tmp_path / "out"
    assert run(monkeypatch, "run", "nvfp4a16", "--model", "demo:dense", "--out", str(out), "--measure") == 0
    assert "not verified: transformers is not installed" in capsys.readouterr().err
    assert read_result(out).evaluation and (out / "README.md").is_file()


def test_an_engine_that_reads_otherwise_ends_the_command_after_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "TOLERANCES", dict.fromkeys(verify.TOLERANCES, 0.0))
    out = tmp_path / "out"
    assert run(monkeypatch, "run", "int4", "--model", "demo:dense", "--out", str(out), "--measure") == 2
    assert "transformers disagrees" in capsys.readouterr().err
    assert (out / "README.md").is_file()


@pytest.mark.parametrize(("method", "engine"), [("gptq", "gptqmodel"), ("auto-round", "auto-round"), ("fp8", "transformers")])
def test_each_format_has_an_engine_of_its_own(method: str, engine: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    assert natural_engine(tmp_path) == engine
