"""A worker that hangs, dies or says nothing is an error that shows what it said; an answer survives the way over the disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from qwench.engines import process
from qwench.engines.base import Request, read_answer
from qwench.errors import EngineError

REQUEST = Request(folder=Path("somewhere"), rows=[[3, 1, 4, 1], [5, 9, 2, 6]], timeout=20.0)


def ask(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Request = REQUEST) -> object:
    (tmp_path / "worker.py").write_text(
        "import json, os, sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n" + script
    )
    monkeypatch.setattr(process, "WORKERS", tmp_path)
    return process.ask(Path(sys.executable), "worker.py", request, {"EXTRA": "on"}, "an engine")


def test_an_answer_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
asked = json.loads((folder / "request.json").read_text())
assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["EXTRA"] == "on" and os.environ["OMP_NUM_THREADS"] == "1"
(folder / "answer.json").write_text(json.dumps({"version": "7", "consumed": ["a"], "generated": asked["rows"][1]}))
"""
    answer = ask(script, tmp_path, monkeypatch)
    assert answer.version == "7" and answer.generated == [5, 9, 2, 6] and answer.logprobs == []  # type: ignore[attr-defined]


def test_nothing_is_left_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that writes logs beside itself, as GPTQModel does: into a folder that goes with it. Paths that the user gave from where he stands still hold."""
    here, script = (
        tmp_path / "here",
        """
os.mkdir("logs")
Path("logs/gptq_log_1.log").write_text("built")
asked = json.loads((folder / "request.json").read_text())
(folder / "answer.json").write_text(json.dumps({"version": "7", "notes": [os.getcwd(), asked["folder"], asked["adapter"]]}))
""",
    )
    (here / "m").mkdir(parents=True)
    monkeypatch.chdir(here)
    answer = ask(script, tmp_path, monkeypatch, Request(folder=Path("m"), rows=[[1, 2]], adapter=Path("a")))
    stood, folder, adapter = answer.notes  # type: ignore[attr-defined]
    assert (folder, adapter) == (str(here / "m"), str(here / "a"))
    assert [path.name for path in here.iterdir()] == ["m"] and not Path(stood).exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("sys.exit('no such kernel')", "no such kernel"),
        ("print('out of ideas')", "out of ideas"),
        ("(folder / 'answer.json').write_text('{')", "without an answer"),
        ("(folder / 'answer.json').write_text('{\"colour\": 1}')", "without an answer"),
        ("os.kill(os.getpid(), 9)", "code -9"),
    ],
)
def test_a_worker_that_leaves_no_answer(script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=said) as caught:
        ask(script, tmp_path, monkeypatch)
    assert "somewhere" in caught.value.what and "make engines" in caught.value.mend


def test_a_worker_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Request(folder=Path("somewhere"), rows=[[1, 2]], timeout=0.5)
    with pytest.raises(EngineError, match=r"not done with somewhere after 0 s"):
        ask("print('loading', flush=True); time.sleep(60)", tmp_path, monkeypatch, slow)


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text(json.dumps({"version": "1"}))
    for row in (10, 2, 0):
        np.savez(
            tmp_path / f"row{row}.npz",
            logprobs=np.full((3, 5), -row, np.float32),
            **({"tokens": np.ones((3, 5), np.int64)} if row else {}),
        )
    rows = read_answer(tmp_path).logprobs
    assert [float(logprobs[0, 0]) for _, logprobs in rows] == [0.0, -2.0, -10.0]
    assert rows[0][0] is None and rows[1][0] is not None
