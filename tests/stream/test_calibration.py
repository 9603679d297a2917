"""Calibration rows: which documents, in which order, cut where; and what is said when there are too few."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from qwench import demo
from qwench.errors import CheckpointError, TextError
from qwench.recipe import Calibration
from qwench.stream.calibration import Document, calibration_rows, pieces, shuffled
from qwench.stream.rows import load_tokenizer
from tests.stream import words
from tests.stream.words import ids, text

END = 0
ORDER_42 = [1, 0, 6, 4, 5, 3, 2]
"""0 to 6 in the order of `printf 42:N | sha256sum`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def seven(tmp_path: Path) -> Path:
    """Document n has the words 100 n, 100 n + 1, ... and 3 n + 2 of them."""
    return write(tmp_path / "seven.jsonl", [{"name": f"d{n}", "text": text(100 * n, 3 * n + 2)} for n in range(7)])


def test_the_order_is_that_of_hashes_and_the_same_on_every_machine() -> None:
    documents = [(number, Document(f"d{number}")) for number in range(7)]
    assert [number for number, _ in shuffled(documents, seed=42)] == ORDER_42
    assert [number for number, _ in shuffled(documents, seed=43)] != ORDER_42


def test_documents_are_shuffled_window_by_window_and_read_no_further() -> None:
    read = []

    def documents():
        for number in range(20):
            read.append(number)
            yield number, Document("", text="x" * 10)

    order = shuffled(documents(), seed=5, window=70)
    assert sorted(next(order)[0] for _ in range(7)) == list(range(7))
    assert read == list(range(7))
    assert sorted(number for number, _ in order) == list(range(7, 20))


def test_conversations_count_towards_a_window() -> None:
    talks = [(n, Document("", messages=({"role": "user", "content": "x" * 26},))) for n in range(9)]
    first = [n for n, _ in shuffled(talks, seed=1, window=60)][:2]
    assert sorted(first) == [0, 1]


def test_packed_rows_are_documents_joined_and_cut(folder: Path, seven: Path) -> None:
    rows = calibration_rows(folder, str(seven), samples=6, length=13, seed=42)
    stream: list[int] = []
    starts = []
    for number in ORDER_42:
        stream += [END] if stream else []
        starts.append((len(stream), number))
        stream += ids(100 * number, 3 * number + 2)
    assert rows.ids.dtype == torch.int64 and rows.ids.tolist() == [stream[i * 13 : i * 13 + 13] for i in range(6)]
    owners = [max(s for s in starts if s[0] <= 13 * row)[1] for row in range(6)]
    assert rows.documents == tuple(owners) and rows.names == tuple(f"d{n}" for n in owners)
    assert rows.left_out == {} and rows.skipped == 0 and rows.revision is None
    assert rows.text == "seven.jsonl" and rows.text_sha256 == hashlib.sha256(seven.read_bytes()).hexdigest()
    literal = b"".join(i.to_bytes(8, "little") for i in rows.ids.flatten().tolist())
    assert rows.ids_sha256 == hashlib.sha256(literal).hexdigest()


def test_rows_of_single_documents_are_their_beginnings(folder: Path, seven: Path) -> None:
    rows = calibration_rows(folder, str(seven), samples=3, length=11, seed=42, packed=False)
    long_enough = [number for number in ORDER_42 if 3 * number + 2 >= 11]
    assert rows.documents == tuple(long_enough[:3])
    assert rows.ids.tolist() == [ids(100 * number, 11) for number in long_enough[:3]]
    before = ORDER_42[: ORDER_42.index(long_enough[2])]
    assert rows.skipped == rows.left_out.get("too short", 0) == sum(3 * number + 2 < 11 for number in before) > 0


@pytest.mark.parametrize("packed", [True, False])
def test_more_rows_begin_with_the_same_rows(folder: Path, seven: Path, packed: bool) -> None:
    few, many = (calibration_rows(folder, str(seven), samples=n, length=5, seed=3, packed=packed) for n in (2, 5))
    assert many.ids[:2].tolist() == few.ids.tolist()
    other = calibration_rows(folder, str(seven), samples=5, length=5, seed=4, packed=packed)
    assert other.ids_sha256 != many.ids_sha256 and other.text_sha256 == many.text_sha256


def test_random_numbers_of_others_change_nothing(folder: Path, seven: Path) -> None:
    first = calibration_rows(folder, str(seven), samples=4, length=7)
    random.seed(99)
    torch.manual_seed(99)
    assert calibration_rows(folder, str(seven), samples=4, length=7).ids_sha256 == first.ids_sha256


def test_pieces_hold_all_of_a_text_and_end_at_lines() -> None:
    lines = "".join(f"line {i}\n" for i in range(23)) + "y" * 77
    found = list(pieces([(4, Document("book", text=lines)), (5, Document("note", text="short"))], 30))
    assert "".join(d.text for n, d in found if n == 4) == lines
    assert all(len(d.text) <= 30 for _, d in found)
    assert all(d.text.endswith("\n") for _, d in found[:6])
    assert [d.name for _, d in found[:2]] == ["book [0]", "book [1]"] and found[-1] == (5, Document("note", text="short"))


def test_a_long_document_does_not_fill_all_rows(folder: Path, tmp_path: Path) -> None:
    book = {"name": "book", "text": text(0, 400)}
    path = write(tmp_path / "mixed.jsonl", [book, *({"name": f"n{i}", "text": text(500 + 9 * i, 9)} for i in range(9))])
    rows = calibration_rows(folder, str(path), samples=12, length=6)
    flat = rows.ids.flatten().tolist()
    breaks = [i for i, (here, following) in enumerate(itertools.pairwise(flat)) if following != here + 1]
    assert max(b - a for a, b in zip([0, *breaks], [*breaks, len(flat)], strict=True)) <= 8 * 6 / 3
    assert any(n.startswith("book [") for n in rows.names) and any(n.startswith("n") for n in rows.names)


@pytest.mark.parametrize("packed", [True, False])
def test_one_long_text_is_taken_in_pieces(folder: Path, tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(text(10 * i, 10) + "\n" for i in range(50)), encoding="utf-8")
    rows = calibration_rows(folder, str(path), samples=5, length=9, packed=packed)
    assert rows.documents == (0,) * 5 and all(name.startswith("long.txt [") for name in rows.names)
    for row in rows.ids.tolist():
        for here, following in itertools.pairwise(row):
            assert following == here + 1 or END in (here, following)
    assert rows.ids[:, 0].tolist() != sorted(rows.ids[:, 0].tolist())


def test_a_folder_is_hashed_by_its_documents(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "texts"
    (place / "deep").mkdir(parents=True)
    for n, name in enumerate(("b.txt", "a.txt", "deep/c.txt")):
        (place / name).write_text(text(30 * n, 12), encoding="utf-8")
    rows = calibration_rows(folder, str(place), samples=3, length=7, packed=False)
    assert sorted(rows.names) == ["a.txt", "b.txt", "deep/c.txt"] and rows.text == "texts"
    again = calibration_rows(folder, str(place), samples=3, length=7, packed=False)
    (place / "b.txt").write_text(text(0, 12) + " w999", encoding="utf-8")
    changed = calibration_rows(folder, str(place), samples=3, length=7, packed=False)
    assert rows.text_sha256 == again.text_sha256 != changed.text_sha256
    assert rows.ids_sha256 == changed.ids_sha256


def test_special_tokens_in_a_text_are_read_as_such(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"text": "<|im_start|> w3 w4 <|im_end|> w5"}])
    assert calibration_rows(folder, str(path), samples=1, length=5).ids.tolist() == [[1, *ids(3, 2), 2, *ids(5, 1)]]


def talk(*contents: object) -> dict[str, object]:
    return {"messages": [{"role": role, "content": c} for role, c in zip(("user", "assistant") * 3, contents, strict=False)]}


def test_conversations_go_through_the_template_with_thinking_or_without(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", [talk("w1 w2", "<think>\nw7\n</think>\n\nw8 w9")])
    tokenizer = load_tokenizer(folder)
    question, answer = "<|im_start|> user w1 w2 <|im_end|> <|im_start|> assistant", "w8 w9 <|im_end|>"
    filled = calibration_rows(folder, str(path), samples=1, length=13)
    assert tokenizer.convert_ids_to_tokens(filled.ids[0]) == f"{question} <think> w7 </think> {answer}".split()
    off = calibration_rows(folder, str(path), samples=1, length=10, thinking="off")
    assert tokenizer.convert_ids_to_tokens(off.ids[0]) == f"{question} {answer}".split()


def test_records_with_images_are_left_out_or_taken_without_and_counted(folder: Path, tmp_path: Path) -> None:
    seen = talk([{"type": "image", "image": "cat.png"}, {"type": "text", "text": "w1 w2"}], "w3 w4 w5")
    beside = {"image": "dog.png", **talk("<image>\nw11 w12", "w13 w14 w15")}
    path = write(tmp_path / "chat.jsonl", [seen, beside, {"image": None, **talk("w21 w22", "w23 w24 w25")}])
    skipped = calibration_rows(folder, str(path), samples=1, length=6, packed=False)
    assert skipped.documents == (2,)
    with pytest.raises(TextError, match=r"1 documents of at least 6 tokens, in 3 documents.*\(2 with images\)"):
        calibration_rows(folder, str(path), samples=2, length=6, packed=False)
    taken = calibration_rows(folder, str(path), samples=3, length=11, packed=False, images="text")
    assert taken.left_out == {"taken without images": 2}
    im_start, im_end, user, assistant = 1, 2, words.FIRST + 1000, words.FIRST + 1001
    for document, row in zip(taken.documents, taken.ids.tolist(), strict=True):
        first = 10 * document + 1
        assert row == [im_start, user, *ids(first, 2), im_end, im_start, assistant, *ids(first + 2, 3), im_end]


def test_refused_conversations_are_counted_and_the_first_is_told(folder: Path, tmp_path: Path) -> None:
    odd = {"messages": [{"role": "nobody", "content": "w1"}]}
    path = write(tmp_path / "chat.jsonl", [odd, talk("w1", "w2"), {"messages": []}])
    rows = calibration_rows(folder, str(path), samples=1, length=8, seed=1)
    assert rows.documents == (1,)
    with pytest.raises(TextError, match=r"1 refused conversations.*chat\.jsonl, line 1: the chat template says.*who is nobody"):
        calibration_rows(folder, str(path), samples=2, length=8)


def test_too_few_tokens_says_how_many_there_were(folder: Path, seven: Path) -> None:
    total = sum(3 * n + 2 for n in range(7)) + 6
    with pytest.raises(
        TextError, match=rf"seven\.jsonl has {total} tokens, in 7 documents; 10 rows of 13 tokens need 130"
    ) as caught:
        calibration_rows(folder, str(seven), samples=10, length=13)
    assert f"set calibration.samples to {total // 13}" in caught.value.mend
    calibration_rows(folder, str(seven), samples=total // 13, length=13)


def test_too_few_long_documents_says_how_many_there_were(folder: Path, seven: Path) -> None:
    with pytest.raises(TextError, match=r"has 2 documents of at least 15 tokens, in 7 documents.*\(5 too short\)") as caught:
        calibration_rows(folder, str(seven), samples=3, length=15, packed=False)
    assert "calibration.samples to 2" in caught.value.mend and "pack" in caught.value.mend


def test_a_text_of_blanks_gives_no_rows(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "blank.jsonl", [{"text": " \n"}, {"text": None}])
    with pytest.raises(TextError, match=r"has 0 tokens, in 2 documents.*\(2 empty\)"):
        calibration_rows(folder, str(path), samples=1, length=2)


def test_a_tokenizer_without_template_or_end_of_text_is_named(tmp_path: Path, seven: Path) -> None:
    bare = words.save_tokenizer(tmp_path / "bare", special=["<|im_start|>"], template=None)
    with pytest.raises(CheckpointError, match=r"neither <\|endoftext\|> nor an eos_token"):
        calibration_rows(bare, str(seven), samples=1, length=5)
    assert calibration_rows(bare, str(seven), samples=1, length=5, packed=False).ids.shape == (1, 5)
    chat = write(tmp_path / "chat.jsonl", [talk("w1", "w2")])
    with pytest.raises(CheckpointError, match=r"no chat template, and chat\.jsonl, line 1 is a conversation"):
        calibration_rows(bare, str(chat), samples=1, length=2, packed=False)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        calibration_rows(tmp_path / "absent", str(seven))


@pytest.mark.parametrize(("samples", "length"), [(0, 9), (3, 1)])
def test_sizes_without_meaning_are_refused(folder: Path, seven: Path, samples: int, length: int) -> None:
    with pytest.raises(TextError, match=f"{samples} rows of {length} tokens"):
        calibration_rows(folder, str(seven), samples=samples, length=length)


@pytest.mark.parametrize("which", ["dense", "moe"])
def test_the_carried_text_is_enough_for_the_defaults_and_for_real_tokenizers(which) -> None:
    settings = Calibration()
    rows = calibration_rows(demo.checkpoint(which), **settings.model_dump(exclude={"experts"}))
    assert rows.ids.shape == (settings.samples, settings.length) == (128, 512)
    assert len(set(rows.documents)) >= 10
    assert rows.text_sha256 == hashlib.sha256(demo.text("calibration").read_bytes()).hexdigest()
