"""A tokenizer whose tokens can be counted by hand: one for each word `w0` to `w999`."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<think>", "</think>"]
FIRST = len(SPECIAL) + 1
"""The id of `w0`."""
UNKNOWN = len(SPECIAL)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('who is nobody?') }}{% endif %}"
    "<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
)


def save_tokenizer(folder: Path, *, special: list[str] = SPECIAL, template: str | None = TEMPLATE) -> Path:
    names = [*special, "unknown", *(f"w{i}" for i in range(1000)), "user", "assistant", "system"]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="unknown"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=special, unk_token="unknown")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def text(first: int, count: int) -> str:
    """`count` words that count up from `first`."""
    return " ".join(f"w{i}" for i in range(first, first + count))


def ids(first: int, count: int) -> list[int]:
    """The tokens of `text`."""
    return list(range(FIRST + first, FIRST + first + count))
