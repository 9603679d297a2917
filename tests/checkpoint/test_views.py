"""Views: the tensors of other sources, bit for bit, under names of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.views import Place, View, of
from qwench.errors import CheckpointError
from tests.support.files import bits, same_bits, write_folder

TRUNK_NORM = "model.language_model.norm.weight"
HEAD = {"mtp.fc.weight": torch.arange(15.0).reshape(3, 5).bfloat16(), "mtp.norm.weight": torch.arange(7.0)}
TRUNK = {TRUNK_NORM: torch.arange(11.0), "mtp.fc.weight": torch.full((3, 5), 9.0).bfloat16()}


@pytest.fixture
def trunk(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_folder(tmp_path / "trunk", {"model.safetensors": TRUNK}))


@pytest.fixture
def donor(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_folder(tmp_path / "donor", {"a.safetensors": HEAD}))


@pytest.fixture
def view(trunk: Checkpoint, donor: Checkpoint) -> View:
    places = {"model.norm.weight": Place(trunk, TRUNK_NORM), **of(donor)}
    return View(trunk.folder, {"model_type": "mine"}, places, ["said of the view"])


def test_tensors_come_from_where_their_places_say(view: View, trunk: Checkpoint, donor: Checkpoint) -> None:
    assert view.tensors.keys() == {"model.norm.weight", "mtp.fc.weight", "mtp.norm.weight"}
    assert same_bits(view.read("model.norm.weight"), TRUNK[TRUNK_NORM])
    assert same_bits(view.read("mtp.fc.weight", (slice(1, 3),)), HEAD["mtp.fc.weight"][1:3])
    assert b"".join(map(bytes, view.chunks("mtp.fc.weight"))) == bits(HEAD["mtp.fc.weight"])
    assert b"".join(map(bytes, view.chunks("mtp.fc.weight", (2,)))) == bits(HEAD["mtp.fc.weight"][2])
    assert view.config == {"model_type": "mine"}
    assert view.folder == trunk.folder
    assert view.sources == (trunk, donor)


def test_an_entry_is_found_from_the_folder_of_the_view(view: View, trunk: Checkpoint, donor: Checkpoint) -> None:
    own, foreign = view.tensors["model.norm.weight"], view.tensors["mtp.fc.weight"]
    assert (own.name, own.file, own.start) == ("model.norm.weight", "model.safetensors", trunk.tensors[TRUNK_NORM].start)
    assert view.folder / foreign.file == (donor.folder / "a.safetensors").resolve()
    assert (foreign.dtype, foreign.shape) == ("BF16", (3, 5))


@pytest.mark.parametrize("ask", [lambda view, name: view.read(name), lambda view, name: view.chunks(name)])
@pytest.mark.parametrize("name", [TRUNK_NORM, "no.such"])
def test_a_tensor_that_the_view_does_not_show_is_refused(view: View, ask: object, name: str) -> None:
    with pytest.raises(CheckpointError, match="holds no tensor"):
        ask(view, name)  # type: ignore[operator]


def test_the_stamp_follows_every_source_the_names_and_the_config(trunk: Checkpoint, donor: Checkpoint) -> None:
    def stamp(config: dict[str, int], **names: str) -> str:
        places = {new: Place(donor if old.startswith("mtp.") else trunk, old) for new, old in names.items()}
        return View(trunk.folder, dict(config), places).stamp()

    first = stamp({"a": 1}, x="mtp.fc.weight", y=TRUNK_NORM)
    assert first == stamp({"a": 1}, x="mtp.fc.weight", y=TRUNK_NORM)
    assert first != stamp({"a": 2}, x="mtp.fc.weight", y=TRUNK_NORM)
    assert first != stamp({"a": 1}, x=TRUNK_NORM, y="mtp.fc.weight")
    os.utime(donor.folder / "a.safetensors", ns=(1, 1))
    assert first != stamp({"a": 1}, x="mtp.fc.weight", y=TRUNK_NORM)


def test_notes_are_those_of_the_sources_and_its_own_once_each(trunk: Checkpoint, view: View) -> None:
    trunk.notes.append("odd")
    nested = View(trunk.folder, {}, {**of(view), **of(trunk, ["mtp.fc.weight"])}, ["odd", "new"])
    assert nested.notes == ["said of the view", "odd", "new"]


def test_views_stand_on_views(view: View) -> None:
    twice = View(view.folder, {}, {"other": Place(view, "mtp.norm.weight")})
    assert same_bits(twice.read("other"), HEAD["mtp.norm.weight"])
    assert twice.tensors["other"].file == view.tensors["mtp.norm.weight"].file


def test_a_part_of_a_tensor_is_a_tensor_of_the_view(donor: Checkpoint) -> None:
    name, weight = "mtp.fc.weight", HEAD["mtp.fc.weight"]
    view = View(donor.folder, {}, {"row": Place(donor, name, (2,)), "block": Place(donor, name, (slice(1, 3),))})
    assert (view.tensors["row"].shape, view.tensors["block"].shape) == ((5,), (2, 5))
    assert same_bits(view.read("row"), weight[2])
    assert same_bits(view.read("block", (1, slice(2, 4))), weight[1:3][1, 2:4])
    assert b"".join(map(bytes, view.chunks("block"))) == bits(weight[1:3])
    assert view.stamp() != View(donor.folder, {}, {"row": Place(donor, name, (1,)), "block": Place(donor, name)}).stamp()
