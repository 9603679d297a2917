"""What a release is made from, and the files that ride along."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import PlanError, RecipeError
from qwench.models import map_of
from qwench.recipe import Recipe, parse_recipe
from qwench.run import plan_for
from qwench.steps.materials.prepare import prepared, release_sidecars
from tests.support.files import same_bits
from tests.support.tiny import Layout, write_tiny

PROCESSOR = "preprocessor_config.json"


def recipe(export: str = "{}", first: str = "", more: str = "") -> Recipe:
    return parse_recipe(f"name: mine\n{more}steps:\n{first}  - export: {export}\n", "mine")


def tiny(folder: Path, layout: Layout = "conditional") -> Checkpoint:
    write_tiny(folder, layout=layout)
    (folder / "tokenizer.json").write_text("{}")
    (folder / PROCESSOR).write_text(folder.name)
    return Checkpoint.open(folder)


def test_a_recipe_that_changes_no_outline_leaves_the_source_as_it_is(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source")
    assert prepared(recipe(), source, None) is source
    causal = tiny(tmp_path / "causal", "causal")
    assert prepared(recipe("{layout: text}"), causal, None) is causal


def test_the_text_layout_leaves_tower_and_processor_behind(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source")
    made = prepared(recipe("{layout: text}"), source, None)
    map = map_of(made)
    assert (map.prefix, map.has_vision, map.has_mtp) == ("model.", False, True)
    name = "layers.3.self_attn.q_proj.weight"
    assert same_bits(made.read(f"model.{name}"), source.read(f"model.language_model.{name}"))
    assert release_sidecars(recipe("{layout: text}"), made, None).keys() == {"tokenizer.json"}
    assert release_sidecars(recipe(), source, None).keys() == {"tokenizer.json", PROCESSOR}


@pytest.mark.parametrize("layout", ["source", "text"])
def test_a_dropped_head_is_gone_from_tensors_and_config(layout: str, tmp_path: Path) -> None:
    made = prepared(recipe(f"{{layout: {layout}, drop: [mtp]}}"), tiny(tmp_path / "source"), None)
    assert not map_of(made).has_mtp
    assert made.config["mtp_num_hidden_layers"] == made.config.get("text_config", made.config)["mtp_num_hidden_layers"] == 0
    assert map_of(made).has_vision == (layout == "source")


def test_a_tower_cannot_be_dropped_where_classes_would_make_one_up() -> None:
    with pytest.raises(RecipeError, match="say layout: text"):
        recipe("{drop: [vision]}")
    assert recipe("{drop: [vision], layout: text}").export.drop == ("vision",)


def test_a_processor_comes_with_a_grafted_tower(tmp_path: Path) -> None:
    donor = tiny(tmp_path / "donor")
    trunk = Checkpoint.open(write_tiny(tmp_path / "trunk", vision=False))
    steps = recipe(first="  - graft: {components: [vision]}\n")
    made = prepared(steps, trunk, donor)
    assert release_sidecars(steps, made, donor) == {PROCESSOR: donor.folder / PROCESSOR}
    (trunk.folder / PROCESSOR).write_text("its own")
    assert release_sidecars(steps, made, donor) == {PROCESSOR: trunk.folder / PROCESSOR}


def test_a_graft_needs_a_donor_and_a_donor_a_graft(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    with pytest.raises(PlanError, match="recipe mine grafts mtp and names no donor"):
        plan_for(recipe(first="  - graft: {}\n"), str(source))
    with pytest.raises(PlanError, match="recipe mine has no graft step"):
        plan_for(recipe(), str(source), donor=str(source))
    with pytest.raises(PlanError, match="names no donor"):
        prepared(recipe(first="  - graft: {}\n"), Checkpoint.open(source), None)


def test_a_plan_tells_of_the_graft_and_the_command_line_wins(tmp_path: Path) -> None:
    trunk, donor = write_tiny(tmp_path / "trunk", mtp=None), write_tiny(tmp_path / "donor")
    named = recipe(first=f"  - graft: {{donor: {tmp_path / 'nowhere'}}}\n")
    plan = plan_for(named, str(trunk), donor=str(donor))
    assert plan.notes[0] == f"MTP head grafted from {donor}: 15 tensors"
    assert plan.config["mtp_num_hidden_layers"] == 1
    assert sum(name.startswith("mtp.") for file in plan.files for name in [t.name for t in file.tensors]) == 15
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((donor / "config.json").read_bytes())
    assert {t.name for f in plan_for(named, str(trunk), donor=str(alone)).files for t in f.tensors} == {
        t.name for f in plan.files for t in f.tensors
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("graft: {components: []}", "at least 1"),
        ("graft: {components: [mtp, mtp]}", "a component is named twice"),
        ("graft: {component: [mtp]}", "did you mean 'components'"),
        ("graft: {components: [embed]}", "'mtp' or 'vision'"),
    ],
)
def test_a_graft_that_cannot_be_meant_is_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        recipe(first=f"  - {text}\n")


def test_the_gate_is_on_by_default_and_off_where_somebody_says_so() -> None:
    gate = recipe().acceptance
    assert gate != "off" and (gate.floor, gate.documents, gate.length) == (0.5, 8, 256)
    assert recipe(more="acceptance: off\n").acceptance == "off"
    with pytest.raises(RecipeError, match="acceptance"):
        recipe(more="acceptance: {floor: 1.5}\n")


def test_the_gate_is_asked_of_the_bytes_and_makes_none(tmp_path: Path) -> None:
    """A run that was refused goes on with another floor: the fingerprint must not know it."""
    source = str(write_tiny(tmp_path / "source"))
    prints = {
        plan_for(recipe(more=more), source).fingerprint for more in ("", "acceptance: off\n", "acceptance: {floor: 0.1}\n")
    }  # type: ignore[union-attr]
    assert len(prints) == 1
