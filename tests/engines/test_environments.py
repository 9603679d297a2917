"""Engines that are not there say how to get them; where they are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.engines import ENGINES, Request
from qwench.engines.environments import home
from qwench.errors import EngineError


@pytest.mark.parametrize(("engine", "name"), [("vllm", "vLLM"), ("gptqmodel", "GPTQModel"), ("auto-round", "auto-round")])
def test_an_absent_engine_says_how_to_get_it(engine: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENCH_ENGINES", str(tmp_path))
    with pytest.raises(EngineError, match=f"there is no {name} in {tmp_path}") as caught:
        ENGINES[engine](Request(tmp_path, [[1, 2]]))
    assert "make engines" in caught.value.mend and f"make.sh {engine}" in caught.value.mend


@pytest.mark.parametrize("engine", ["vllm", "gptqmodel", "auto-round"])
def test_every_environment_is_made(engine: str) -> None:
    """The names in the mend above are folders of `scripts/engines`, with all that `make.sh` wants."""
    folder = Path(__file__).parents[2] / "scripts" / "engines" / engine
    assert (folder / "requirements.txt").is_file() and (folder / "proof.py").is_file()


def test_where_engines_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWENCH_ENGINES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert home() == Path("/cache/qwench/engines")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "qwench" / "engines"
    monkeypatch.setenv("QWENCH_ENGINES", "/elsewhere")
    assert home() == Path("/elsewhere")
