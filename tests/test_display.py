"""Progress as plain lines: how much is done, what is left to wait for, and what an earlier run had done."""

from __future__ import annotations

import pytest
from rich.console import Console

from qwench import display
from qwench.display import Report
from qwench.result import Figures
from tests.steps.releases import estimate, evaluation


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_time_left_is_reckoned_from_what_this_run_did(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("int4", "blocks", None)
    report(20, 40, "layer 20")
    clock[0] += 11
    report(20, 40, "layer 20")
    assert "left" not in capsys.readouterr().err, "nothing is known of the pace yet"
    clock[0] += 19
    report(25, 40, "layer 25 (26 of 40): gptq, 512 tokens/s")
    said = capsys.readouterr().err
    assert said.startswith("int4 layer 25 (26 of 40): gptq, 512 tokens/s: 25 of 40 blocks, 90 s left, peak memory"), said


def test_the_next_piece_of_work_is_reckoned_by_itself(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("int4", "blocks", None)
    report(0, 40, "walk")
    clock[0] += 400
    report(40, 40, "walk")
    report(0, 10, "head")
    clock[0] += 12
    report(4, 10, "head")
    assert "4 of 10 blocks, 18 s left" in capsys.readouterr().err


def test_figures_stand_beside_those_without_corrections(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "out", Console(width=150, highlight=False))
    without = Figures.model_validate(
        evaluation().model_dump(include=set(Figures.model_fields)) | {"top1_agreement": estimate(0.7, 0.01)}
    )
    display.show_evaluation(evaluation(without_corrections=without))
    said = capsys.readouterr().out
    assert "with corrections" in said and "without" in said
    (line,) = [line.split() for line in said.splitlines() if line.startswith("top-1")]
    assert line == ["top-1", "agreement", "0.9431", "±", "0.0041", "0.7000", "±", "0.0100"]
    display.show_evaluation(evaluation(acceptance_release=None))
    said = capsys.readouterr().out
    assert "without" not in said and ["2", "0.693", "±", "0.012", "-"] in [line.split()[4:] for line in said.splitlines()]
