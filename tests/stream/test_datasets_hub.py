"""Data sets through the `datasets` library: real files in the hub's layout; for the hub itself, what is asked of it."""

from __future__ import annotations

import builtins
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from PIL import Image

from qwench.errors import TextError
from qwench.stream import datasets_hub
from qwench.stream.calibration import calibration_rows
from qwench.stream.datasets_hub import HubName, hub_name, hub_table
from qwench.stream.texts import find_text
from tests.stream import words

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class NetworkError(errors.HfHubHTTPError.__bases__[0]):  # type: ignore[misc]
    """What the library's HTTP library raises where there is no connection."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)


def table(path: Path, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path


def read(text: object, column: str | None = None, split: str = "train") -> list[str]:
    return [d.text for d in find_text(str(text), column, split, None).documents]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two configs; the first has two splits, the training split in two files."""
    folder = tmp_path / "repository"
    for shard in range(2):
        table(folder / "small" / f"train-0000{shard}-of-00002.parquet", text=[f"s{shard}{i}" for i in range(3)], n=[1, 2, 3])
    table(folder / "small" / "test-00000-of-00001.parquet", text=["held"], n=[9])
    table(folder / "data" / "large" / "train-00000-of-00001.parquet", text=["l0", "l1"], n=[4, 5])
    paths = {"small": "small/{}-*", "large": "data/large/{}-*"}
    lines = ["---", "configs:"]
    for config, path in paths.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test")[: 2 if config == "small" else 1]:
            lines += [f"  - split: {split}", f"    path: {path.format(split)}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
    return folder


def test_a_folder_in_the_hubs_layout(repository: Path) -> None:
    assert read(repository / "large") == ["l0", "l1"]  # a config that README.md names; there is no such folder
    assert read(repository / "small") == [f"s{shard}{i}" for shard in range(2) for i in range(3)]
    assert read(repository / "small", split="test") == ["held"]
    assert find_text(str(repository / "large"), None, "train", None).name == "repository/large, train"


@pytest.mark.parametrize(
    ("place", "column", "split", "expected"),
    [
        ("", None, "train", "['small', 'large']"),
        ("small", None, "dev", "['train', 'test']"),
        ("small", "txt", "train", "has no column 'txt' (did you mean 'text'?); it has text, n"),
        ("medium", None, "train", "there is no text"),
    ],
)
def test_what_a_folder_lacks_is_named(repository: Path, place: str, column: str | None, split: str, expected: str) -> None:
    with pytest.raises(TextError) as caught:
        read(repository / place, column, split)
    assert expected in str(caught.value)


def test_one_parquet_file(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", body=[f"b{i}" for i in range(700)], n=list(range(700)))
    assert read(path) == [f"b{i}" for i in range(700)]
    assert find_text(str(path), None, "train", None).sha256


def test_parquet_without_records_and_parquet_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is empty"):
        read(table(tmp_path / "none.parquet", text=pa.array([], pa.string())))
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    with pytest.raises(TextError, match=r"bad\.parquet cannot be read"):
        read(tmp_path / "bad.parquet")


def test_json_lines_in_a_folder_and_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    assert read(tmp_path) == ["a", "b"]
    path.write_text('{"text": "a"}\n{"text"\n', encoding="utf-8")
    with pytest.raises(TextError, match="cannot be read"):
        read(tmp_path)


def test_a_folder_with_a_script_is_refused_and_the_script_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    (folder / "train.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(TextError, match="scripts") as caught:
        read(folder)
    assert "refs/convert/parquet" in caught.value.mend and not (tmp_path / "ran").exists()


def test_articles_of_a_wikitext_folder(tmp_path: Path) -> None:
    lines = ["", " = One = \n", " first . \n", " = = Part = = \n", " second . \n", " = Two = \n", " third . \n"]
    table(tmp_path / "wikitext-2-raw-v1" / "train-00000-of-00001.parquet", text=lines)
    table(tmp_path / "lines" / "train-00000-of-00001.parquet", text=lines)
    names = [d.name for d in find_text(str(tmp_path / "wikitext-2-raw-v1"), None, "train", None).documents]
    assert names == ["One", "Two"] and len(read(tmp_path / "lines")) == 7


def test_images_are_seen_and_never_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png = io.BytesIO()
    Image.new("RGB", (4, 3)).save(png, "png")
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"picture": datasets.Image(), "messages": [message]})
    talks = [[{"role": "user", "content": f"w{i} w{i}"}] for i in range(3)]
    pictures = [{"bytes": png.getvalue(), "path": None}, None, {"bytes": b"no image at all", "path": None}]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"picture": pictures, "messages": talks}, features=features).to_parquet(
        tmp_path / "data" / "train.parquet"
    )
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded an image"))
    assert [d.media for d in find_text(str(tmp_path / "data"), None, "train", None).documents] == [True, False, True]
    folder = words.save_tokenizer(tmp_path / "tokenizer")
    rows = calibration_rows(folder, str(tmp_path / "data"), samples=3, length=5, packed=False, images="text")
    assert sorted(row[2] - words.FIRST for row in rows.ids.tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "revision", "expected"),
    [
        ("wikitext", None, HubName("Salesforce/wikitext", "wikitext-2-raw-v1", None)),
        ("wikitext/wikitext-103-raw-v1@ab1", None, HubName("Salesforce/wikitext", "wikitext-103-raw-v1", "ab1")),
        ("pile-10k", "ab1", HubName("NeelNanda/pile-10k", None, "ab1")),
        ("NeelNanda/pile-10k@ab1", "ab1", HubName("NeelNanda/pile-10k", None, "ab1")),
        ("org/name/config@refs/convert/parquet", None, HubName("org/name", "config", "refs/convert/parquet")),
        ("c4", None, HubName("c4", None, None)),
    ],
)
def test_names_on_the_hub(text: str, revision: str | None, expected: HubName) -> None:
    assert hub_name(text, revision) == expected


def test_names_that_are_none_and_two_revisions() -> None:
    for text in ("a//b", "a/b/c/d", "what is this", "a/b@"):
        with pytest.raises(TextError, match="neither a text on this machine nor"):
            hub_name(text, None)
    with pytest.raises(TextError, match=r"one revision and .* another, cd2"):
        hub_name("a/b@ab1", "cd2")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub that notes what is asked of it."""
    asked = SimpleNamespace(info=[], load=[], sha=COMMIT, records=[{"text": f"w{i} w{i}", "n": i} for i in range(5)])

    def info(_self: object, repo: str, revision: str | None = None) -> SimpleNamespace:
        asked.info.append((repo, revision))
        if isinstance(asked.sha, Exception):
            raise asked.sha
        return SimpleNamespace(sha=asked.sha)

    def load(path: str, **named: object) -> object:
        asked.load.append((path, named))
        found = datasets.Dataset.from_list(asked.records)
        return found.to_iterable_dataset() if named["streaming"] else found

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_the_commit_is_looked_up_and_all_is_read_of_it(hub: SimpleNamespace, tmp_path: Path) -> None:
    folder = words.save_tokenizer(tmp_path / "tokenizer")
    rows = calibration_rows(folder, "org/name/config@main", split="validation", samples=4, length=2, packed=False)
    assert hub.info == [("org/name", "main")]
    assert hub.load == [("org/name", {"name": "config", "split": "validation", "revision": COMMIT, "streaming": True})]
    assert rows.revision == COMMIT and rows.text == f"org/name/config@{COMMIT}, validation"
    again = calibration_rows(folder, "org/name/config", split="validation", samples=4, length=2, packed=False)
    hub.records[4]["text"] = "w7 w7"
    changed = calibration_rows(folder, "org/name/config", split="validation", samples=4, length=2, packed=False)
    assert rows.text_sha256 == again.text_sha256 != changed.text_sha256


def test_wikitext_of_the_hub_comes_as_articles(hub: SimpleNamespace) -> None:
    hub.records = [{"text": line} for line in ("", " = One = \n", " a . \n", " = Two = \n", " b . \n")]
    found = find_text("wikitext", None, "train", None)
    assert [d.name for d in found.documents] == ["One", "Two"]
    assert hub.load[0] == (
        "Salesforce/wikitext",
        {"name": "wikitext-2-raw-v1", "split": "train", "revision": COMMIT, "streaming": True},
    )


def test_what_the_cache_has_is_used_where_the_hub_cannot_be_reached(hub: SimpleNamespace) -> None:
    for reason in (errors.OfflineModeIsEnabled("offline"), NetworkError("no route")):
        hub.sha = reason
        found = hub_table("org/name", "train", "ab1")
        assert len(list(found.records)) == 5
        assert hub.load[-1] == ("org/name", {"name": None, "split": "train", "revision": "ab1", "streaming": False})
        assert found.revision is None and found.name == "org/name@ab1, train"


def test_neither_hub_nor_cache(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.sha = errors.OfflineModeIsEnabled("offline")
    monkeypatch.setattr(datasets, "load_dataset", _raising(ConnectionError("nothing cached")))
    with pytest.raises(TextError, match="the hub cannot be reached, and `datasets` has no copy: nothing cached"):
        hub_table("org/name", "train", None)


def test_offline_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries themselves, told to stay offline, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(TextError, match=r"org/name/config is no file or folder here.* has no copy"):
        hub_table("org/name/config", "train", None)


def _raising(error: Exception) -> Callable[..., Any]:
    def load(*_: object, **__: object) -> None:
        raise error

    return load


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (errors.GatedRepoError, "org/name is gated"),
        (errors.RepositoryNotFoundError, "the hub shows no such data set"),
        (errors.RevisionNotFoundError, "has no revision ab1"),
    ],
)
def test_what_the_hub_refuses_is_told(hub: SimpleNamespace, kind: type[Exception], expected: str) -> None:
    hub.sha = kind.__new__(kind)  # its constructor wants a response of whichever HTTP library is used
    with pytest.raises(TextError) as caught:
        hub_table("org/name@ab1", "train", None)
    assert expected in str(caught.value) and caught.value.mend and hub.load == []


def test_a_stream_that_breaks_is_told(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        yield {"text": "a"}
        raise NetworkError("connection lost")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(broken))
    with pytest.raises(TextError, match=r"org/name@0123.* cannot be read: connection lost"):
        list(hub_table("org/name", "train", None).records)


def test_without_the_library_the_mend_is_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **named)

    path = table(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setattr(builtins, "__import__", without)
    for text in ("org/name", str(path)):
        with pytest.raises(TextError, match="need the library `datasets`") as caught:
            find_text(text, None, "train", None)
        assert "qwench[data]" in caught.value.mend
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "b"}), encoding="utf-8")
    assert read(tmp_path / "b.jsonl") == ["b"]


def test_a_library_that_would_run_scripts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(TextError, match=r"datasets 3\.6\.0 would run scripts"):
        hub_table("org/name", "train", None)
    assert datasets_hub.FIRST_VERSION == 4
