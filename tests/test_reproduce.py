"""Releases made again: the same bytes from the same source, and a plain word where anything is different."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from qwench import cli
from qwench.display import Report
from qwench.errors import CheckpointError, RecipeError
from qwench.recipe import parse_recipe
from qwench.reproduce import differences, origin_of, reproduce
from qwench.run import run_recipe
from qwench.steps.provenance import SourceProof, read_provenance
from tests.support.tiny import write_tiny

QUIET = Report("test", "bytes", None)
GPTQ = """
name: small-gptq
calibration: {samples: 6, length: 64, seed: 5}
steps:
  - quantize: {rules: [{roles: [mlp.*, attention.*], scheme: int4}], method: gptq}
  - export: {}
acceptance: off
"""
RTN = "name: small-rtn\nsteps:\n  - quantize: {rules: [{roles: [mlp.*], scheme: nvfp4}]}\n  - export: {}\n"
GGUF = "name: small-gguf\nsteps:\n  - export: {format: gguf, types: [Q4_K_M], mmproj: none}\nacceptance: off\n"


def command(*arguments: str) -> int:
    before, sys.argv = sys.argv, ["qwench", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.mark.parametrize("recipe", [GPTQ, GGUF], ids=["gptq", "gguf"])
def test_the_demo_is_made_again_to_the_byte(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe(parse_recipe(recipe, "t"), "demo:dense", tmp_path / "one", 1, QUIET)
    threads = torch.get_num_threads()
    assert command("reproduce", str(tmp_path / "one"), "--out", str(tmp_path / "two"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same"] and len(found["files"]) > 5
    for file in found["files"]:
        assert (tmp_path / "one" / file["name"]).read_bytes() == (tmp_path / "two" / file["name"]).read_bytes()
    assert torch.get_num_threads() == threads


def test_a_local_source_is_asked_for_and_then_held_against_its_hashes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tiny(tmp_path / "tiny", shards=2)
    run_recipe(parse_recipe(RTN, "t"), str(source), tmp_path / "one", 1, QUIET, accept_any=True)
    assert command("reproduce", str(tmp_path / "one"), "--out", str(tmp_path / "two")) == 2
    assert "--model" in capsys.readouterr().err
    other = write_tiny(tmp_path / "other", shards=2, seed=3)
    with pytest.raises(CheckpointError, match="is not the tiny") as caught:
        reproduce(tmp_path / "one", tmp_path / "two", QUIET, str(other))
    assert "model-00001-of-00002.safetensors" in str(caught.value)
    assert not (tmp_path / "two").exists()
    assert reproduce(tmp_path / "one", tmp_path / "two", QUIET, str(source)).same


def test_a_release_that_was_not_made_by_its_provenance_is_found_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its record says another number of bits than its bytes have, and one file was changed afterwards."""
    source = write_tiny(tmp_path / "tiny")
    release = tmp_path / "one"
    run_recipe(parse_recipe(RTN, "t"), str(source), release, 1, QUIET, accept_any=True)
    text = (release / "provenance.json").read_text().replace('"nvfp4"', '"int4"')
    (release / "provenance.json").write_text(text)
    (release / "config.json").write_text((release / "config.json").read_text() + " ")
    assert command("reproduce", str(release), "--model", str(source), "--out", str(tmp_path / "two")) == 2
    said = capsys.readouterr()
    assert "config.json" in said.err and "changed after the run" in said.err
    assert "model.safetensors" in said.err and "mlp.gate_proj.weight_global_scale" in said.err
    assert said.out.count("differs") == 2


def test_other_versions_are_named(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "tiny")
    run_recipe(parse_recipe(RTN, "t"), str(source), tmp_path / "one", 1, QUIET, accept_any=True)
    recorded = read_provenance(tmp_path / "one")
    assert differences(recorded) == []
    changed = recorded.versions | {"torch": "1.0.0", "a-package-nobody-has": "3"}
    notes = differences(recorded.model_copy(update={"versions": changed}))
    assert any("torch" in note and "1.0.0 made the release" in note for note in notes)
    assert any("a-package-nobody-has is not installed here" in note for note in notes)
    found = json.loads((tmp_path / "one" / "provenance.json").read_text())
    found["recipe"]["steps"][0] = {"a step of the future": {}}
    (tmp_path / "one" / "provenance.json").write_text(json.dumps(found))
    with pytest.raises(RecipeError, match="does not fit this version"):
        reproduce(tmp_path / "one", tmp_path / "two", QUIET, str(source))


def test_what_to_type_for_a_source() -> None:
    assert origin_of(SourceProof(name="demo:moe", files=[]), "--model") == "demo:moe"
    assert origin_of(SourceProof(name="org/name", revision="c0ffee", files=[]), "--model") == "org/name@c0ffee"
    with pytest.raises(CheckpointError, match="local folder"):
        origin_of(SourceProof(name="name", revision="c0ffee", files=[]), "--donor")
