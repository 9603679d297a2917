"""What rides along into a release, and what stays behind."""

from __future__ import annotations

from pathlib import Path

from qwench.checkpoint.sidecars import left_behind, sidecars_of

CARRIED = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.md",
]
REPLACED = ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"]
BEHIND = [
    "README.md",
    "modeling_qwen.py",
    "LICENSE.py",
    "pytorch_model.bin",
    "model.gguf",
    "quantize_config.json",
    "tokenizer.json.bak",
]
HIDDEN = [".gitattributes", ".DS_Store"]


def folder_of_everything(folder: Path) -> Path:
    for name in (*CARRIED, *REPLACED, *BEHIND, *HIDDEN):
        (folder / name).write_text(name)
    (folder / "figures").mkdir()
    (folder / "figures" / "vocab.json").write_text("nested")
    (folder / ".cache").mkdir()
    return folder


def test_what_belongs_to_the_model_rides_along(tmp_path: Path) -> None:
    found = sidecars_of(folder_of_everything(tmp_path))
    assert sorted(found) == sorted(CARRIED)
    assert all(path.read_text() == name for name, path in found.items())


def test_the_rest_is_listed(tmp_path: Path) -> None:
    assert left_behind(folder_of_everything(tmp_path)) == sorted([*BEHIND, "figures/"])


def test_folders_and_dead_links_do_not_ride(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").mkdir()
    (tmp_path / "merges.txt").symlink_to(tmp_path / "gone")
    assert sidecars_of(tmp_path) == {}


def test_links_of_the_hubs_cache_ride(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("x")
    (tmp_path / "vocab.json").symlink_to("blob")
    assert sidecars_of(tmp_path)["vocab.json"].read_text() == "x"
