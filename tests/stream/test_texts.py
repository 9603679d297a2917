"""A word that a person wrote, and the text that it means; local files in all their kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwench import demo
from qwench.errors import TextError
from qwench.stream import texts
from qwench.stream.texts import find_text


def read(path: object, column: str | None = None) -> list[tuple[str, str]]:
    return [(d.name, d.text) for d in find_text(str(path), column, "train", None).documents]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_carried_text() -> None:
    lines = demo.text("calibration").read_text(encoding="utf-8").splitlines()
    assert read("carried") == [(r["name"], r["text"]) for r in map(json.loads, lines)]


def test_json_lines_under_both_names_and_lists(tmp_path: Path) -> None:
    records = [{"text": "one"}, {"text": "zwei ä"}]
    lines = "\n\n".join(json.dumps(r) for r in records) + "\n"
    assert read(written(tmp_path / "a.jsonl", lines)) == [("a.jsonl, line 1", "one"), ("a.jsonl, line 3", "zwei ä")]
    assert read(written(tmp_path / "b.json", lines)) == [("b.json, line 1", "one"), ("b.json, line 3", "zwei ä")]
    assert read(written(tmp_path / "c.json", json.dumps(records))) == [("c.json, item 1", "one"), ("c.json, item 2", "zwei ä")]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"text": "x"}'), ("a.json", '[{"text": "x"}]'), ("a.txt", "x")):
        assert read(written(tmp_path / name, b"\xef\xbb\xbf" + content.encode()))[0][1] == "x"


def test_a_long_text_is_read_in_blocks_that_end_with_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "BLOCK", 13)
    content = "".join(f"line {i}\n" for i in range(11))
    found = find_text(str(written(tmp_path / "long.txt", content)), None, "train", None)
    blocks = [d.text for d in found.documents]
    assert "".join(blocks) == content and len(blocks) > 4 and all(b.endswith("\n") for b in blocks)
    assert found.one_long


def test_a_folder_of_texts_comes_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        written(tmp_path / name, name)
    written(tmp_path / "notes.md", "not a text")
    assert read(tmp_path) == [("a.txt", "a.txt"), ("b.txt", "b.txt"), ("deep/c.txt", "deep/c.txt")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n["x"]\n', "a.jsonl, line 2 is no JSON object"),
        ("a.json", '[{"text": "x"}, 5]', "a.json, item 2 is no JSON object"),
        ("a.json", '[{"text": "x"}', "a.json is not JSON"),
        ("a.json", "[]", "a.json is empty"),
        ("a.jsonl", "\n\n", "a.jsonl is empty"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.txt", "", "a.txt is empty"),
        ("a.txt", b"\xe9t\xe9", "a.txt is not UTF-8"),
        ("a.jsonl", b'{"text": "\xe9"}', "a.jsonl is not UTF-8"),
        ("a.json", b'[{"text": "\xe9"}]', "a.json is not UTF-8"),
        ("a.csv", "x", "a.csv: texts are .txt, .jsonl, .json, .parquet, not .csv"),
        ("LICENSE", "x", "not files without an ending"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    with pytest.raises(TextError) as caught:
        read(written(tmp_path / name, content))
    assert expected in str(caught.value) and caught.value.mend


def test_what_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(texts.datasets_hub, "hub_table", lambda *_: pytest.fail("asked the hub"))
    for text in ("texts/train.jsonl", "./org/name", str(tmp_path / "absent")):
        with pytest.raises(TextError, match="there is no text"):
            find_text(text, None, "train", None)
    with pytest.raises(TextError, match=r"folder .* holds none of \.txt"):
        find_text(str(tmp_path), None, "train", None)


def test_a_path_that_exists_wins_over_the_hub_and_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(texts.datasets_hub, "hub_table", lambda *_: pytest.fail("asked the hub"))
    (tmp_path / "wikitext").mkdir()
    written(tmp_path / "wikitext" / "a.txt", "mine")
    assert read("wikitext") == [("a.txt", "mine")]
    with pytest.raises(TextError, match="has no revision 'abc'"):
        find_text("wikitext", None, "train", "abc")
