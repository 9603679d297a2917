"""Folders that are not what they say, and the one clear message for each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError
from tests.support.files import INDEX, item, write_folder, write_index, write_json, write_raw

GATE, UP, DOWN = torch.ones(2, 3), torch.ones(4, 5).bfloat16(), torch.ones(6).half()
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def refusal(folder: Path) -> CheckpointError:
    """The error of opening, which says how to mend it."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert caught.value.mend
    return caught.value


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "m", {ONE: {"gate": GATE}, TWO: {"up": UP, "down": DOWN}})


def test_no_folder(tmp_path: Path) -> None:
    assert f"there is no folder {tmp_path / 'nowhere'}" in refusal(tmp_path / "nowhere").what


def test_a_file_for_a_folder(sharded: Path) -> None:
    assert f"{sharded / ONE} is a file" in refusal(sharded / ONE).what


def test_no_config(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    assert f"{sharded} holds no config.json" in refusal(sharded).what


@pytest.mark.parametrize(("text", "word"), [("{'a': 1}", "is not JSON"), ("", "is not JSON"), ("[1]", "not an object")])
def test_config_that_is_no_object(sharded: Path, text: str, word: str) -> None:
    (sharded / "config.json").write_text(text)
    what = refusal(sharded).what
    assert "config.json" in what
    assert word in what


def test_config_in_another_encoding(sharded: Path) -> None:
    (sharded / "config.json").write_bytes('{"name": "Käse"}'.encode("latin-1"))
    assert "config.json is not JSON" in refusal(sharded).what


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles(tmp_path: Path, pickle: str) -> None:
    write_json(tmp_path / "config.json", {})
    (tmp_path / pickle).write_bytes(b"\x80\x04")
    error = refusal(tmp_path)
    assert pickle in error.what
    assert "run code" in error.what
    assert "convert the checkpoint to safetensors" in error.mend


def test_no_weights(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    assert f"{tmp_path} holds no safetensors files" in refusal(tmp_path).what


def test_index_that_is_not_json(sharded: Path) -> None:
    (sharded / INDEX).write_text("{")
    assert f"{sharded / INDEX} is not JSON" in refusal(sharded).what


@pytest.mark.parametrize("weight_map", [None, ["gate"], {"gate": 3}])
def test_index_without_a_map(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    assert f"{sharded / INDEX} has no weight_map" in refusal(sharded).what


def test_index_naming_a_missing_file(sharded: Path) -> None:
    (sharded / TWO).unlink()
    assert f"names {TWO}, which is not in the folder" in refusal(sharded).what


def test_index_naming_a_tensor_that_its_file_lacks(sharded: Path) -> None:
    write_index(sharded, {"gate": ONE, "up": TWO, "down": ONE, "head": TWO})
    what = refusal(sharded).what
    assert f"says that {ONE} holds down" in what
    assert f"says that {TWO} holds head" in what


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd.safetensors", "sub/a.safetensors", "..\\a.safetensors", "..", ""]
)
def test_index_that_leaves_the_folder(sharded: Path, name: str) -> None:
    write_index(sharded, {"gate": ONE, "up": name})
    what = refusal(sharded).what
    assert repr(name) in what
    assert "not directly in that folder" in what


def test_index_naming_a_pickle(sharded: Path) -> None:
    write_index(sharded, {"gate": "pytorch_model-00001-of-00002.bin"})
    assert "names pytorch_model-00001-of-00002.bin, a pickle" in refusal(sharded).what


def test_index_naming_another_kind_of_file(sharded: Path) -> None:
    write_index(sharded, {"gate": "model.gguf"})
    assert "names model.gguf, which is no safetensors file" in refusal(sharded).what


@pytest.mark.parametrize("index", [True, False])
def test_tensor_in_two_files(tmp_path: Path, index: bool) -> None:
    write_folder(tmp_path, {ONE: {"gate": GATE, "down": DOWN}, TWO: {"gate": GATE, "up": UP}}, index=index)
    assert f"tensor gate is in both {ONE} and {TWO}" in refusal(tmp_path).what


def test_link_to_nothing(sharded: Path) -> None:
    (sharded / TWO).unlink()
    (sharded / TWO).symlink_to(sharded / "blob")
    assert f"{sharded / TWO} is a link to nothing" in refusal(sharded).what


def test_links_as_the_hubs_cache_makes_them(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (sharded / TWO).rename(tmp_path / "blobs" / "4f2a")
    (sharded / TWO).symlink_to(Path("..") / "blobs" / "4f2a")
    assert torch.equal(Checkpoint.open(sharded).read("up"), UP)


def test_every_fault_at_once(sharded: Path) -> None:
    (sharded / "config.json").write_text("{")
    (sharded / ONE).write_bytes((sharded / ONE).read_bytes()[:-5])
    write_raw(sharded / TWO, {"up": item("U8", [3], 0, 4)}, b"abcd")
    error = refusal(sharded)
    for word in ("config.json is not JSON", f"{ONE} is truncated", "tensor up: U8 of shape [3] is 3 bytes"):
        assert word in error.what
    assert error.mend.count("fetch the file again") == 1  # one mend for all, said once


def test_tensors_that_the_index_forgets_are_read_and_noted(sharded: Path) -> None:
    write_index(sharded, {"gate": ONE, "up": TWO})
    checkpoint = Checkpoint.open(sharded)
    assert checkpoint.tensors.keys() == {"gate", "up", "down"}
    assert checkpoint.notes == [f"{TWO}: 1 tensors that the index does not name, read nevertheless: down"]


def test_files_that_the_index_forgets_are_noted_and_not_read(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"junk")
    checkpoint = Checkpoint.open(sharded)
    assert checkpoint.tensors.keys() == {"gate", "up", "down"}
    assert checkpoint.notes == ["consolidated.safetensors: not named by the index, not read"]


def test_several_files_without_an_index(tmp_path: Path) -> None:
    write_folder(tmp_path, {"model.safetensors": {"gate": GATE}, "visual_mtp.safetensors": {"up": UP}}, index=False)
    checkpoint = Checkpoint.open(tmp_path)
    assert {name: entry.file for name, entry in checkpoint.tensors.items()} == {
        "gate": "model.safetensors",
        "up": "visual_mtp.safetensors",
    }


def test_files_without_wanted_tensors_may_be_absent(sharded: Path) -> None:
    (sharded / TWO).unlink()
    checkpoint = Checkpoint.open(sharded, wanted=lambda name: name == "gate")
    assert torch.equal(checkpoint.read("gate"), GATE)
    assert checkpoint.files.keys() == {ONE}
    assert checkpoint.notes == []
    with pytest.raises(CheckpointError, match=TWO):
        Checkpoint.open(sharded, wanted=lambda name: name in {"gate", "down"})
