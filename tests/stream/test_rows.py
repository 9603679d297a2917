import hashlib
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qwench.errors import CheckpointError, TextError
from qwench.stream import rows as rows_module
from qwench.stream.rows import held_out_rows, ids_sha256, load_tokenizer, rows_from_text

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
WORDS = "the quick brown fox jumps over a lazy dog while seven zebras graze "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE with the ChatML tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(
        [WORDS],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False),
    )
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def write(path, documents):
    path.write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    return path


@pytest.fixture
def text(tmp_path):
    return write(tmp_path / "text.jsonl", [{"name": f"d{i}", "text": f"{i} " + WORDS * (i % 3)} for i in range(9)])


def test_one_row_per_long_enough_document(folder, text):
    rows = rows_from_text(text, folder, documents=4, length=13)
    tokenizer = load_tokenizer(folder)
    assert rows.ids.shape == (4, 13) and rows.ids.dtype == torch.int64
    assert rows.documents == (1, 2, 4, 5) and rows.names == ("d1", "d2", "d4", "d5") and rows.skipped == 2
    for index, ids in zip(rows.documents, rows.ids.tolist(), strict=True):
        assert ids == tokenizer(f"{index} " + WORDS * (index % 3))["input_ids"][:13]
    assert rows.text == "text.jsonl" and rows.text_sha256 == hashlib.sha256(text.read_bytes()).hexdigest()


def test_hash_of_ids_sees_every_token(folder, text):
    rows = rows_from_text(text, folder, documents=2, length=5)
    literal = b"".join(i.to_bytes(8, "little") for i in rows.ids.flatten().tolist())
    assert rows.ids_sha256 == hashlib.sha256(literal).hexdigest()
    changed = rows.ids.clone()
    changed[1, 4] += 1
    assert ids_sha256(changed) != rows.ids_sha256


def test_messages_go_through_the_chat_template(folder, tmp_path):
    messages = [{"role": "user", "content": "the lazy dog"}, {"role": "assistant", "content": WORDS}]
    rows = rows_from_text(write(tmp_path / "chat.jsonl", [{"messages": messages}]), folder, documents=1, length=12)
    tokenizer = load_tokenizer(folder)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert rows.ids[0, 0] == start
    assert tokenizer.decode(rows.ids[0]).startswith("<|im_start|>user\nthe lazy dog<|im_end|>")


def test_plain_text_is_cut_into_consecutive_stretches(folder, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(WORDS * 5, encoding="utf-8")
    rows = rows_from_text(path, folder, documents=3, length=11)
    assert rows.ids.flatten().tolist() == load_tokenizer(folder)(WORDS * 5)["input_ids"][:33]


def test_held_out_text_of_the_package(folder, text, monkeypatch):
    monkeypatch.setattr(rows_module, "carried_text", lambda name: text if name == "held.jsonl" else None)
    rows = held_out_rows(folder, documents=2, length=7)
    assert rows.ids.shape == (2, 7) and "held-out" in rows.text


def test_too_few_long_documents_names_the_numbers(folder, text):
    with pytest.raises(TextError, match="has 6 documents of at least 13 tokens among 9; 7 were asked for"):
        rows_from_text(text, folder, documents=7, length=13)


def test_too_short_a_text_names_the_numbers(folder, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("the quick", encoding="utf-8")
    with pytest.raises(TextError, match=r"has \d+ tokens; 2 rows of 400 tokens need 800"):
        rows_from_text(path, folder, documents=2, length=400)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2 is not JSON"), ('{"title": "x"}', "line 2 has neither a text"), ("[1]", "line 2 has neither a text")],
)
def test_broken_lines_are_named(folder, tmp_path, line, message):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(TextError, match=message):
        rows_from_text(path, folder, documents=1, length=9)


def test_missing_text_unknown_ending_and_wrong_encoding(folder, tmp_path):
    with pytest.raises(TextError, match=r"there is no text .*nothing\.txt"):
        rows_from_text(tmp_path / "nothing.txt", folder, 1, 4)
    for name, message in (("table.csv", "not .csv"), ("latin.txt", "not UTF-8"), ("latin.jsonl", "not UTF-8")):
        (tmp_path / name).write_bytes(b"\xe9t\xe9")
        with pytest.raises(TextError, match=message):
            rows_from_text(tmp_path / name, folder, 1, 4)


def test_missing_or_broken_tokenizer(text, tmp_path):
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        rows_from_text(text, tmp_path, 1, 4)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read"):
        rows_from_text(text, tmp_path, 1, 4)


def test_a_tokenizer_with_code_of_its_own_is_refused(text, tmp_path, folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}), encoding="utf-8"
    )
    (tmp_path / "own.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    with pytest.raises(CheckpointError, match="code of its own"):
        rows_from_text(text, tmp_path, 1, 4)
