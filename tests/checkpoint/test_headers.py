"""Headers of a model on the hub: every file that the index names is asked for its beginning, and disagreements are told."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo

from qwench.checkpoint.headers import Headers, open_headers
from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError
from tests.support.files import write_folder

FILES = {"a.safetensors": {"x": torch.ones(2, 5)}, "b.safetensors": {"y": torch.ones(3)}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that plays a hub model: its config and index as a snapshot, its files as headers."""
    published = write_folder(tmp_path / "published", FILES)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(published))
    return published


def answer(tensors: dict[str, tuple[str, list[int]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file holds the tensors that are told for it by the file's first letter."""

    def header(self: object, repo: str, file: str, *, revision: str | None) -> SafetensorsFileMetadata:
        dtype, shape = tensors[file[0]]
        return SafetensorsFileMetadata({}, {{"a": "x", "b": "y"}[file[0]]: TensorInfo(dtype, shape, (0, 8))})

    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", header)


def test_names_dtypes_and_shapes_without_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer({"a": ("F32", [2, 5]), "b": ("BF16", [3])}, monkeypatch)
    source, values = open_headers("org/name@v1")
    assert isinstance(source, Headers) and not values and not source.notes
    assert {(e.name, e.dtype, e.shape, e.file) for e in source.tensors.values()} == {
        ("x", "F32", (2, 5), "a.safetensors"), ("y", "BF16", (3,), "b.safetensors"),
    }  # fmt: skip
    for ask in (source.read, lambda name: next(iter(source.chunks(name)))):
        with pytest.raises(CheckpointError, match="only headers were"):
            ask("x")


def test_an_index_that_names_what_no_file_holds_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def header(self: object, repo: str, file: str, *, revision: str | None) -> SafetensorsFileMetadata:
        return SafetensorsFileMetadata({}, {"x": TensorInfo("F32", [2, 5], (0, 40))} if file == "a.safetensors" else {})

    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", header)
    source, _ = open_headers("org/name")
    assert list(source.notes) == ["the index names 1 tensors that are not in the file it says, y first"]


def test_damaged_and_strange_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer({"a": ("F6_E2M3", [2, 5]), "b": ("BF16", [3])}, monkeypatch)
    with pytest.raises(CheckpointError, match="dtype F6_E2M3"):
        open_headers("org/name")

    def damaged(*_: object, **__: object) -> SafetensorsFileMetadata:
        raise SafetensorsParsingError("no header")

    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", damaged)
    with pytest.raises(CheckpointError, match=r"a\.safetensors of hub model org/name cannot be read: no header"):
        open_headers("org/name")


def test_a_folder_is_opened_whole(folder: Path) -> None:
    source, values = open_headers(str(folder))
    assert isinstance(source, Checkpoint) and values and source.read("y").tolist() == [1, 1, 1]
