"""Grafting: what comes from the donor, what is refused and with which numbers, what is fetched for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError, PlanError
from qwench.models import map_of, sketch
from qwench.models.components import component_names
from qwench.recipe import Graft, parse_recipe
from qwench.run import plan_for
from qwench.steps.materials.graft import grafted, open_donor
from tests.checkpoint.test_hub import COMMIT, Hub
from tests.support.files import INDEX, same_bits
from tests.support.memory import MemorySource
from tests.support.tiny import Head, Layout, save_checkpoint, tiny_config, tiny_shapes, tiny_tensors, write_tiny

MTP = Graft()


def headless(folder: Path, **layout: Any) -> Checkpoint:
    """A checkpoint that lost its head; its config still announces it."""
    write_tiny(folder, mtp=None, seed=7, **layout)
    wanted = {key: layout[key] for key in ("moe", "layout", "vision", "tied") if key in layout}
    (folder / "config.json").write_text(json.dumps(tiny_config(**wanted)))
    return Checkpoint.open(folder)


def donor_of(folder: Path, **layout: Any) -> Checkpoint:
    return Checkpoint.open(write_tiny(folder, shards=3, **layout))


def edited(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Checkpoint:
    config = json.loads((folder / "config.json").read_text())
    edit(config.get("text_config", config))
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


def refusal(trunk: Checkpoint, donor: Checkpoint, settings: Graft = MTP) -> str:
    with pytest.raises(PlanError) as caught:
        grafted(trunk, donor, settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("moe", "head", "trunk_layout", "donor_layout", "count"),
    [
        (False, "dense", "conditional", "conditional", 15),
        (False, "dense", "causal", "conditional", 15),
        (False, "dense", "conditional", "causal", 15),
        (True, "fused", "conditional", "causal", 19),
        (True, "single", "causal", "conditional", 35),
    ],
)
def test_the_head_is_the_donors_and_the_rest_the_trunks(
    moe: bool, head: Head, trunk_layout: Layout, donor_layout: Layout, count: int, tmp_path: Path
) -> None:
    trunk = headless(tmp_path / "trunk", moe=moe, layout=trunk_layout)
    donor = donor_of(tmp_path / "donor", moe=moe, layout=donor_layout, mtp=head)
    view = grafted(trunk, donor, MTP)
    heads = component_names(view.tensors, "mtp")
    assert len(heads) == count
    assert view.tensors.keys() - set(heads) == trunk.tensors.keys()
    assert all(same_bits(view.read(name), donor.read(name)) for name in heads)
    assert all(same_bits(view.read(name), trunk.read(name)) for name in trunk.tensors)
    assert len(map_of(view).mtp) == 1
    assert any(f"MTP head grafted from {donor.folder}: {count} tensors" in note for note in view.notes)


def test_the_config_announces_the_head_wherever_readers_look(tmp_path: Path) -> None:
    trunk = Checkpoint.open(write_tiny(tmp_path / "trunk", mtp=None))
    assert trunk.config["text_config"]["mtp_num_hidden_layers"] == 0
    config = grafted(trunk, donor_of(tmp_path / "donor"), MTP).config
    assert config["mtp_num_hidden_layers"] == config["text_config"]["mtp_num_hidden_layers"] == 1
    assert trunk.config["text_config"]["mtp_num_hidden_layers"] == 0


NUMBERS = [
    (False, "hidden_size", 256), (False, "num_attention_heads", 12), (False, "num_key_value_heads", 2), (False, "intermediate_size", 384),
    (True, "num_experts", 5), (True, "moe_intermediate_size", 384), (True, "shared_expert_intermediate_size", 128),
]  # fmt: skip


@pytest.mark.parametrize(("moe", "key", "value"), NUMBERS)
def test_a_donor_of_another_shape_is_refused_with_both_numbers(moe: bool, key: str, value: int, tmp_path: Path) -> None:
    config = tiny_config(moe=moe)
    before = config["text_config"][key]
    config["text_config"][key] = value
    save_checkpoint(tmp_path / "donor", config, tiny_tensors(tiny_shapes(config)))
    said = refusal(headless(tmp_path / "trunk", moe=moe), Checkpoint.open(tmp_path / "donor"))
    assert f"{key}: the donor has {value}, the trunk {before}" in said
    assert said.count("the donor has") == 1


def test_a_donor_of_another_kind_is_refused(tmp_path: Path) -> None:
    said = refusal(headless(tmp_path / "trunk"), donor_of(tmp_path / "donor", moe=True))
    assert "the donor is a mixture of experts, the trunk dense" in said


def test_a_donor_whose_config_lies_is_refused_by_its_tensors(tmp_path: Path) -> None:
    donor = write_tiny(tmp_path / "donor")
    tensors = load_file(donor / "model.safetensors")
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"][:, :192].contiguous()
    save_file(tensors, donor / "model.safetensors")
    said = refusal(headless(tmp_path / "trunk"), Checkpoint.open(donor))
    assert "mtp.fc.weight" in said and "[128, 192], [128, 256] is needed" in said


def test_a_donor_without_a_head_is_refused(tmp_path: Path) -> None:
    said = refusal(headless(tmp_path / "trunk"), headless(tmp_path / "donor"))
    assert f"the donor {tmp_path / 'donor'} has no MTP head" in said


def half(folder: Path) -> Checkpoint:
    write_tiny(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["mtp.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def test_half_a_head_names_the_missing_tensor_on_either_side(tmp_path: Path) -> None:
    missing = "14 of 15 tensors are stored, missing: mtp.layers.0.mlp.up_proj.weight"
    assert missing in refusal(headless(tmp_path / "trunk"), half(tmp_path / "half"))
    assert missing in refusal(Checkpoint.open(tmp_path / "half"), donor_of(tmp_path / "donor"))


def test_a_head_that_is_there_is_replaced_only_where_that_was_said(tmp_path: Path) -> None:
    """The layouts of the two heads differ: nothing of the old one may stay."""
    trunk = Checkpoint.open(write_tiny(tmp_path / "trunk", moe=True, mtp="fused", seed=5))
    donor = donor_of(tmp_path / "donor", moe=True, mtp="single")
    assert "has a whole MTP head: 19 tensors" in refusal(trunk, donor)
    view = grafted(trunk, donor, Graft(replace=True))
    assert set(component_names(view.tensors, "mtp")) == set(component_names(donor.tensors, "mtp"))
    assert map_of(view).has_mtp
    assert "19 tensors of the source were replaced by the donor's" in view.notes


def test_settings_that_change_what_the_head_computes_are_told(tmp_path: Path) -> None:
    trunk = headless(tmp_path / "trunk")
    donor = donor_of(tmp_path / "donor")
    edited(tmp_path / "donor", lambda text: text.update(rms_norm_eps=1e-5))
    notes = grafted(trunk, Checkpoint.open(donor.folder), MTP).notes
    assert any("rms_norm_eps is 1e-06 here, and was 1e-05 where the graft was trained" in note for note in notes)


def test_a_tower_is_grafted_with_its_config(tmp_path: Path) -> None:
    trunk = Checkpoint.open(write_tiny(tmp_path / "trunk", vision=False, seed=4))
    donor = donor_of(tmp_path / "donor")
    view = grafted(trunk, donor, Graft(components=("vision",)))
    assert view.config["vision_config"] == donor.config["vision_config"]
    assert map_of(view).has_vision
    assert same_bits(view.read("model.visual.pos_embed.weight"), donor.read("model.visual.pos_embed.weight"))
    assert same_bits(view.read("mtp.fc.weight"), trunk.read("mtp.fc.weight"))


def test_a_tower_does_not_fit_a_text_only_model_nor_one_of_another_width(tmp_path: Path) -> None:
    tower = Graft(components=("vision",))
    donor = donor_of(tmp_path / "donor")
    assert "text-only causal LM" in refusal(Checkpoint.open(write_tiny(tmp_path / "text", layout="causal")), donor, tower)
    trunk = Checkpoint.open(write_tiny(tmp_path / "trunk", vision=False))
    donor.config["vision_config"]["out_hidden_size"] = 256
    assert "puts out 256 channels, the trunk reads 128" in refusal(trunk, donor, tower)


def test_a_lone_config_has_room_for_a_head(tmp_path: Path) -> None:
    """A plan from configs alone: whether the trunk still has its head is not known, and no reason to stop."""
    view = grafted(sketch(tiny_config()), sketch(tiny_config()), MTP)
    assert map_of(view).has_mtp
    assert not [note for note in view.notes if "replaced" in note]
    with pytest.raises(CheckpointError, match="only a config"):
        view.read("mtp.fc.weight")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub on which the head has a shard of its own, as in published checkpoints."""
    folder = tmp_path / "published"
    config = tiny_config()
    tensors = tiny_tensors(tiny_shapes(config), seed=1)
    heads = {name for name in tensors if name.startswith("mtp.")}
    save_checkpoint(folder, config, {})
    (folder / "model.safetensors").unlink()
    files = {"model-1.safetensors": tensors.keys() - heads, "model-2.safetensors": heads}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": {n: f for f, names in files.items() for n in names}}))
    found = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    return found


def test_only_the_shards_that_hold_the_head_are_fetched(hub: Hub, tmp_path: Path) -> None:
    located, donor = open_donor("Qwen/Qwen3.5-9B", ["mtp"])
    assert (located.name, located.revision) == ("Qwen/Qwen3.5-9B", COMMIT)
    fetched = {name for _, names in hub.fetched for name in names}
    assert "model-2.safetensors" in fetched and "model-1.safetensors" not in fetched
    view = grafted(headless(tmp_path / "trunk"), donor, MTP)
    whole = Checkpoint.open(hub.published)
    assert all(same_bits(view.read(n), whole.read(n)) for n in component_names(whole.tensors, "mtp"))


def test_a_plan_fetches_no_shard_at_all(hub: Hub, tmp_path: Path) -> None:
    recipe = parse_recipe("name: t\nsteps:\n  - graft: {donor: Qwen/Qwen3.5-9B}\n  - export: {}\n", "t")
    plan = plan_for(recipe, str(headless(tmp_path / "trunk").folder))
    assert {t.name for f in plan.files for t in f.tensors} == Checkpoint.open(hub.published).tensors.keys()  # type: ignore[union-attr]
    assert not [name for _, names in hub.fetched for name in names if name.endswith(".safetensors")]


def test_a_hub_donor_without_a_head_is_refused_before_a_shard_is_fetched(hub: Hub) -> None:
    index = json.loads((hub.published / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not name.startswith("mtp.")}
    (hub.published / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"the donor Qwen/Qwen3\.5-9B has no MTP head: .* names none of its tensors"):
        open_donor("Qwen/Qwen3.5-9B", ["mtp"])
    assert not [name for _, names in hub.fetched for name in names if name.endswith(".safetensors")]


def test_of_a_folder_with_other_shards_missing_the_head_is_taken(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(hub.published, tmp_path / "part")
    (tmp_path / "part" / "model-1.safetensors").unlink()
    _, donor = open_donor(str(tmp_path / "part"), ["mtp"])
    assert set(donor.tensors) == set(component_names(donor.tensors, "mtp"))
    (tmp_path / "part" / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors"):
        open_donor(str(tmp_path / "part"), ["mtp"])


def test_a_memory_source_is_no_excuse_for_reading_weights(tmp_path: Path) -> None:
    """Putting two checkpoints together reads nothing."""
    sources = [MemorySource(tiny_config(), tiny_tensors(tiny_shapes(tiny_config(mtp=mtp)))) for mtp in (False, True)]
    for source in sources:
        source.notes = ()  # type: ignore[attr-defined]
    grafted(sources[0], sources[1], MTP)  # type: ignore[arg-type]
    assert not sources[0].reads and not sources[1].reads
