"""The tokenizer as metadata, read back by llama.cpp itself; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

from qwench.demo import checkpoint
from qwench.errors import CheckpointError
from qwench.formats.gguf_tokenizer import tokenizer_fields

NORMAL, UNKNOWN, CONTROL, USER, UNUSED = (
    int(getattr(gguf.TokenType, n)) for n in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED")
)
ROWS = 1504


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint("dense") / name, tmp_path)
    return tmp_path


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")


def fields(folder: Path, config: dict[str, Any] | None = None) -> dict[str, Any]:
    return {f.key.removeprefix("tokenizer."): f.value for f in tokenizer_fields(folder, config or {}, ROWS)}


def test_the_demo_tokenizer(folder: Path) -> None:
    found, data = fields(folder), json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens, kinds, vocabulary = found["ggml.tokens"], found["ggml.token_type"], data["model"]["vocab"]
    assert len(tokens) == len(kinds) == ROWS
    assert all(tokens[number] == token and kinds[number] == NORMAL for token, number in vocabulary.items())
    assert tokens[1486:1488] == ["<|im_end|>", "<|endoftext|>"] and kinds[1486:1488] == [CONTROL, CONTROL]
    assert tokens[1500:] == ["[PAD1500]", "[PAD1501]", "[PAD1502]", "[PAD1503]"] and kinds[1500:] == [UNUSED] * 4
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", "qwen35")
    assert found["ggml.merges"][:2] == ["Ġ Ġ", "ĠĠ ĠĠ"] and len(found["ggml.merges"]) == len(data["model"]["merges"])
    assert (found["ggml.eos_token_id"], found["ggml.padding_token_id"]) == (1486, 1487)
    assert "ggml.bos_token_id" not in found
    assert found["chat_template"] == (folder / "chat_template.jinja").read_text(encoding="utf-8")


def test_kinds_of_added_tokens(folder: Path) -> None:
    """As in the published tokenizer: words like <think> are no special tokens, and stay visible; <|...|> are, whatever they say of themselves."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for entry in data["added_tokens"]:
        entry["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    found = fields(folder)
    kinds = dict(zip(found["ggml.tokens"], found["ggml.token_type"], strict=True))
    assert (kinds["<think>"], kinds["</tool_call>"], kinds["<|im_start|>"]) == (USER, USER, CONTROL)


def test_merges_as_strings_are_the_same(folder: Path) -> None:
    expected = fields(folder)["ggml.merges"]
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(folder / "tokenizer.json", model=data["model"] | {"merges": [" ".join(pair) for pair in data["model"]["merges"]]})
    assert fields(folder)["ggml.merges"] == expected


def test_special_tokens_come_from_the_config_where_the_tokenizer_names_none(folder: Path) -> None:
    change(folder / "tokenizer_config.json", eos_token=None, add_bos_token=False)
    found = fields(folder, {"text_config": {"eos_token_id": 77}})
    assert found["ggml.eos_token_id"] == 77
    assert found["ggml.add_bos_token"] is False


def test_chat_templates_are_found_wherever_they_are_kept(folder: Path) -> None:
    change(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "tool", "template": "B"}, {"name": "default", "template": "A"}],
    )
    assert fields(folder)["chat_template"] == "A"
    change(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.jinja").unlink()
    assert "chat_template" not in fields(folder)
    (folder / "chat_template.json").write_text('{"chat_template": "C"}', encoding="utf-8")
    assert fields(folder)["chat_template"] == "C"


def test_another_split_is_refused(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    changed = text.replace("[\\\\p{L}\\\\p{M}]+", "\\\\p{L}+")
    assert changed != text
    (folder / "tokenizer.json").write_text(changed, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"is not the byte-level BPE of Qwen3.5"):
        fields(folder)


def test_missing_damaged_and_too_large(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="tokens up to id 1499, the embedding has 1400 rows"):
        tokenizer_fields(folder, {}, 1400)
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        fields(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        fields(folder)
