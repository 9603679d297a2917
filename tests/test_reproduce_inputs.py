"""Recipes that name local files: their places are published nowhere, and whoever makes the release again is asked for the very files."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.errors import TextError
from qwench.recipe import parse_recipe
from qwench.recipe.shared import local_inputs, public_data, with_inputs
from qwench.reproduce import reproduce
from qwench.run import run_recipe
from qwench.steps.cards.card import write_card
from qwench.steps.provenance import read_provenance

QUIET = Report("test", "bytes", None)
GPTQ = """
name: mine
acceptance: off
calibration: {text: %s, samples: 2, length: 32}
steps:
  - quantize: {method: gptq, rules: [{roles: [mlp.*], scheme: int4}]}
  - export
"""
GRAFT = "name: back\nacceptance: off\nsteps:\n  - graft: {donor: %s}\n  - export\n"
HEADLESS = "name: headless\nsteps:\n  - export: {drop: mtp}\n"
OBSERVED = "name: observed\nacceptance: off\ncalibration: {samples: 2, length: 32}\nsteps:\n  - export: {format: gguf, types: Q4_K_M, mmproj: none, importance: %s}\n"


def told(folder: Path) -> str:
    """Everything in a release that a person reads."""
    write_card(folder)
    return "".join(p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.suffix in {".json", ".md", ".html", ".yaml"})


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder with a calibration text, whose name should never get out."""
    folder = tmp_path / "home-of-somebody"
    folder.mkdir()
    (folder / "mine.txt").write_text("def spam(eggs):\n    return eggs + 1\n" * 200)
    return folder


def test_a_calibration_text_is_asked_for_and_held_against_its_hash(private: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_recipe(parse_recipe(GPTQ % (private / "mine.txt"), "t"), "demo:dense", out, 1, QUIET)
    found = read_provenance(out)
    assert found.recipe["calibration"]["text"] == found.inputs["calibration"].name == "mine.txt"
    assert private.name not in told(out)
    with pytest.raises(TextError, match=r"reads mine\.txt, which lay on the machine(.|\n)*--calibration"):
        reproduce(out, tmp_path / "again", QUIET)
    other = tmp_path / "other.txt"
    other.write_text((private / "mine.txt").read_text() + "x")
    with pytest.raises(TextError, match=r"is not the mine\.txt"):
        reproduce(out, tmp_path / "again", QUIET, inputs={"calibration": str(other)})
    with pytest.raises(TextError, match=r"did you mean 'mine\.txt'"):
        reproduce(out, tmp_path / "again", QUIET, inputs={"calibration": str(private / "mien.txt")})
    with pytest.raises(TextError, match="leave --importance out"):
        reproduce(out, tmp_path / "again", QUIET, inputs={"calibration": str(private / "mine.txt"), "importance": "x"})
    moved = (private / "mine.txt").rename(tmp_path / "elsewhere.txt")
    assert reproduce(out, tmp_path / "again", QUIET, inputs={"calibration": str(moved)}).same


def test_a_file_of_importances_is_asked_for(private: Path, tmp_path: Path) -> None:
    run_recipe(parse_recipe(OBSERVED % "true", "t"), "demo:dense", tmp_path / "first", 1, QUIET)
    importance = (tmp_path / "first" / "imatrix.gguf").rename(private / "imatrix.gguf")
    text = (OBSERVED % importance).replace("calibration: {samples: 2, length: 32}\n", "")
    run_recipe(parse_recipe(text, "t"), "demo:dense", tmp_path / "out", 1, QUIET)
    assert read_provenance(tmp_path / "out").recipe["steps"][-1]["export"]["importance"] == "imatrix.gguf"
    assert private.name not in told(tmp_path / "out")
    with pytest.raises(TextError, match="--importance"):
        reproduce(tmp_path / "out", tmp_path / "again", QUIET)
    assert reproduce(tmp_path / "out", tmp_path / "again", QUIET, inputs={"importance": str(importance)}).same


def test_a_donor_in_the_recipe_is_named_by_its_folder_alone(private: Path, tmp_path: Path) -> None:
    run_recipe(parse_recipe(HEADLESS, "t"), "demo:dense", private / "tuned", 1, QUIET)
    donor = private / "base"
    donor.symlink_to(checkpoint("dense"))
    run_recipe(parse_recipe(GRAFT % donor, "t"), str(private / "tuned"), tmp_path / "out", 1, QUIET)
    assert read_provenance(tmp_path / "out").recipe["steps"][0]["graft"]["donor"] == "dense"
    assert private.name not in told(tmp_path / "out")
    assert reproduce(tmp_path / "out", tmp_path / "again", QUIET, str(private / "tuned"), str(donor)).same


def test_what_is_not_a_local_path_is_published_as_it_is() -> None:
    recipe = parse_recipe(GPTQ % "org/name/config@1a2b", "t")
    assert local_inputs(recipe) == {}
    assert public_data(recipe)["calibration"]["text"] == "org/name/config@1a2b"
    assert with_inputs(public_data(recipe), {"calibration": "x.txt"})["calibration"]["text"] == "x.txt"
