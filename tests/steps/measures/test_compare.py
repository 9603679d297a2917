"""Releases side by side: records are used only on the same rows against the same source, and every number in the table is one that was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qwench import cli
from qwench.checkpoint.hub import Located
from qwench.display import Report
from qwench.errors import CheckpointError
from qwench.recipe import load_recipe, parse_recipe
from qwench.result import Acceptance, Evaluation, Figures, read_result
from qwench.run import run_recipe
from qwench.steps.measures.compare import Contender, compare, comparison_data, comparison_rows, contenders, recorded_rows
from qwench.steps.measures.compare_plot import comparison_figure
from tests.steps.releases import estimate, evaluation

QUIET = Report("test", "bytes", None)
SOURCE = Located(Path("/models/source"), "org/source")
GGUF = "name: g\nsteps:\n  - export: {format: gguf, types: [Q8_0, Q4_K_M], mmproj: none}\nacceptance: off\n"


def contender(name: str, size: int, found: Evaluation | None, source: str = "org/source") -> Contender:
    return Contender(name, Path("/releases") / name, size, found, source)


def never(one: Contender) -> Evaluation:
    raise AssertionError(f"{one.name} was measured again")


def test_records_on_the_same_rows_are_used_and_others_are_measured() -> None:
    a, b = evaluation(), evaluation(top1_agreement=estimate(0.81, 0.02))
    both = [contender("a", 10, a), contender("b", 20, b)]
    assert recorded_rows(both, SOURCE)
    found = compare(both, SOURCE, None, "float32", never)
    assert [one.evaluation for one in found] == [a, b] and all(one.reused for one in found)
    elsewhere = contender("c", 30, evaluation(ids_sha256="ee" * 32))
    against_another = contender("d", 40, a, source="org/other")
    rounded = contender("e", 50, evaluation(compute_dtype="bfloat16"))
    silent = contender("f", 60, None)
    now = evaluation(top1_agreement=estimate(0.5, 0.1))
    for other in (elsewhere, against_another, rounded, silent):
        assert not recorded_rows([*both, other], SOURCE)
        asked: list[str] = []

        def measure(one: Contender, asked: list[str] = asked) -> Evaluation:
            asked.append(one.name)
            return now

        found = compare([*both, other], SOURCE, a.ids_sha256, "float32", measure)
        assert asked == [other.name]
        assert [one.reused for one in found] == [True, True, False]
        assert found[2].evaluation is now


def test_the_table_is_sorted_by_size_and_ends_with_the_source() -> None:
    headless = evaluation(acceptance_release=None)
    found = compare([contender("large", 800, evaluation()), contender("small", 300, headless)], SOURCE, None, "float32", never)
    data = comparison_data(found, SOURCE, 1000)
    assert data["releases"][0]["share"] == 0.8
    assert data["source"]["acceptance"][0]["mean"] == 0.8712
    rows = comparison_rows(data)
    assert [row[0] for row in rows] == ["small", "large", "org/source"]
    assert rows[1] == ("large", 800, "80.0%", "0.02134 ± 0.00114", "0.894", "94.31% ± 0.41%", "6.319", "86.1% ± 1.1%")
    assert rows[0][-1] is None
    assert json.loads(json.dumps(data)) == data


def corrected() -> Evaluation:
    """Figures with corrections, and worse ones without."""
    without = evaluation().model_dump(include=set(Figures.model_fields)) | {"top1_agreement": estimate(0.7, 0.01)}
    return evaluation(corrections=9, without_corrections=Figures.model_validate(without))


def test_a_release_with_corrections_stands_there_without_and_with_them() -> None:
    one = Contender("r", Path("/releases/r"), 300, corrected(), "org/source", 40)
    found = compare([one, contender("large", 800, evaluation())], SOURCE, None, "float32", never)
    data = comparison_data(found, SOURCE, 1000)
    assert [(row["name"], row["bytes"], row["share"], row["corrected"]) for row in data["releases"]] == [
        ("r", 300, 0.3, False), ("r with eora", 340, 0.34, True), ("large", 800, 0.8, False)
    ]  # fmt: skip
    assert [row["top1"]["mean"] for row in data["releases"]] == [0.7, 0.94313, 0.94313]
    assert [row[0] for row in comparison_rows(data)] == ["r", "r with eora", "large", "org/source"]
    assert len(comparison_figure(data).axes[0].containers) == 3


def test_a_record_with_corrections_that_says_nothing_of_the_release_without_is_measured_again() -> None:
    old = evaluation(corrections=9)
    assert not recorded_rows([contender("old", 10, old)], SOURCE) and recorded_rows([contender("new", 10, corrected())], SOURCE)
    found = compare([contender("old", 10, old)], SOURCE, old.ids_sha256, "float32", lambda one: corrected())
    assert not found[0].reused and len(comparison_data(found, SOURCE, 100)["releases"]) == 2


def test_the_bytes_of_corrections_are_counted(tmp_path: Path) -> None:
    (tmp_path / "eora").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"x" * 7)
    (tmp_path / "eora" / "adapter_model.safetensors").write_bytes(b"x" * 5)
    assert [(one.bytes, one.corrections) for one in contenders([tmp_path])] == [(7, 5)]


def test_the_plot_shows_every_release_at_its_numbers() -> None:
    two = [
        contender("large", 5 * 10**9, evaluation()),
        contender("small", 3 * 10**9, evaluation(divergence=evaluation().divergence)),
    ]
    data = comparison_data(compare(two, SOURCE, None, "float32", never), SOURCE, 10**10)
    figure = comparison_figure(data)
    left, right = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["small", "large"]

    def points(axis: Any) -> list[tuple[float, float]]:
        return [(bar.lines[0].get_xdata()[0], bar.lines[0].get_ydata()[0]) for bar in axis.containers]

    assert points(left) == [(3.0, 0.021337), (5.0, 0.021337)]
    assert points(right) == [(3.0, pytest.approx(86.13)), (5.0, pytest.approx(86.13))]
    assert [text.get_text() for text in right.texts] == ["the source"]
    assert any(list(line.get_ydata()) == pytest.approx([87.12, 87.12]) for line in right.lines)
    none = [contender("a", 10, evaluation(acceptance_release=None))]
    assert len(comparison_figure(comparison_data(compare(none, SOURCE, None, "float32", never), SOURCE, 100)).axes) == 1


def test_what_is_no_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors and no GGUF"):
        contenders([tmp_path])
    (tmp_path / "model.safetensors").write_bytes(b"x" * 7)
    assert [(c.name, c.bytes, c.recorded) for c in contenders([tmp_path])] == [(tmp_path.name, 7, None)]
    with pytest.raises(CheckpointError, match="given twice"):
        contenders([tmp_path, tmp_path / "." / ""])


def test_safetensors_and_gguf_meet_on_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe(load_recipe("int4"), "demo:dense", tmp_path / "int4", 1, QUIET, accept_any=True)
    run_recipe(parse_recipe(GGUF, "t"), "demo:dense", tmp_path / "gguf", 1, QUIET)

    def run(*more: str) -> str:
        sys.argv = ["qwench", "compare", str(tmp_path / "int4"), str(tmp_path / "gguf"), "--against", "demo:dense", *more]
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    first = json.loads(run("--documents", "3", "--length", "48", "--json"))
    kl = {row["name"].rpartition("-")[2]: row["kl"]["mean"] for row in first["releases"]}
    assert len(kl) == 3
    assert all(row["measured"] == "now" for row in first["releases"])
    assert 0 < kl["Q8_0.gguf"] < kl["Q4_K_M.gguf"]
    record = read_result(tmp_path / "int4").evaluation
    assert record and record.divergence.mean.mean == kl["int4"]
    table = run("--plot", str(tmp_path / "plot.png"))
    assert "Q8_0.gguf" in table and "demo:dense" in table
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    again = json.loads(run("--json"))
    assert all(row["measured"] == "recorded" for row in again["releases"])
    assert [row["kl"] for row in again["releases"]] == [row["kl"] for row in first["releases"]]
    assert isinstance(record.acceptance_source, Acceptance)
