"""Conversations of data sets, as the model's template gets and renders them."""

from __future__ import annotations

from typing import Any

import pytest

from qwench.stream.chat import holds_media, looks_like_chat, render
from qwench.stream.rows import Document


class Recorder:
    """A tokenizer that shows what its template was handed."""

    def apply_chat_template(self, messages: list[dict[str, Any]], *, tokenize: bool, enable_thinking: bool) -> str:
        assert tokenize is False
        self.messages, self.enable_thinking = messages, enable_thinking
        return "rendered"


def handed(*messages: dict[str, Any], thinking: str = "filled", media: bool = False) -> list[dict[str, Any]]:
    recorder = Recorder()
    assert render(recorder, Document("d", messages=messages, media=media), thinking) == "rendered"
    assert recorder.enable_thinking == (thinking == "filled")
    return recorder.messages


REASONED = [
    {"role": "assistant", "content": "four", "reasoning_content": "two and two\n"},
    {"role": "assistant", "content": "four", "reasoning": "two and two"},
    {"role": "assistant", "content": "four", "thinking": "two and two", "reasoning_content": None},
    {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\nfour"},
    {"role": "assistant", "content": "two and two</think>four"},
    {"from": "gpt", "value": "<think>two and two</think>\nfour"},
]


@pytest.mark.parametrize("message", REASONED)
def test_reasoning_is_filled_or_off_however_the_data_has_it(message: dict[str, Any]) -> None:
    assert handed(message) == [{"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\nfour"}]
    assert handed(message, thinking="off") == [{"role": "assistant", "content": "four"}]


def test_answers_without_reasoning_and_the_words_of_users_stay_as_they_are() -> None:
    plain = [{"role": "user", "content": "what does </think> mean?"}, {"role": "assistant", "content": "it ends a thought"}]
    assert handed(*plain) == plain and handed(*plain, thinking="off") == plain


def test_both_ways_of_writing_conversations() -> None:
    theirs = [("system", "be short"), ("human", "hi"), ("gpt", "ho"), ("observation", "42")]
    ours = [("system", "be short"), ("user", "hi"), ("assistant", "ho"), ("tool", "42")]
    found = handed(*({"from": role, "value": text} for role, text in theirs))
    assert found == handed(*({"role": role, "content": text} for role, text in ours))


def test_media_are_taken_out_and_their_marks_only_where_there_were_media() -> None:
    parts = {"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "which "}, "cat?"]}
    assert handed(parts, media=True) == [{"role": "user", "content": "which cat?"}]
    marked = {"from": "human", "value": "<image>\nwhat is a <video> tag?"}
    assert handed(marked, media=True)[0]["content"] == "what is a  tag?"
    assert handed(marked)[0]["content"] == "<image>\nwhat is a <video> tag?"


def test_arguments_of_tool_calls_become_mappings() -> None:
    def calls(arguments: object) -> list[dict[str, Any]]:
        return [{"type": "function", "function": {"name": "add", "arguments": arguments}}]

    message = {"role": "assistant", "content": None, "tool_calls": calls('{"a": 2, "b": 3}'), "name": None}
    assert handed(message) == [{"role": "assistant", "content": "", "tool_calls": calls({"a": 2, "b": 3})}]
    assert handed(message | {"tool_calls": calls("{broken")})[0]["tool_calls"] == calls("{broken")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"from": "narrator", "value": "x"}, "from 'narrator'; known: human"),
        ({"role": "user", "content": 7}, "a part of a message is int"),
        ({"text": "x"}, "from 'None'"),
    ],
)
def test_messages_without_sense_are_refused(message: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        handed(message)


def test_what_is_a_conversation_and_what_holds_media() -> None:
    assert looks_like_chat([{"role": "user"}]) and looks_like_chat([{"from": "human"}])
    assert not any(looks_like_chat(value) for value in ("role", [], ["role"], [{"url": 1}], None, 5))
    for kind in ("image", "image_url", "video", "input_audio"):
        assert holds_media([{"content": "hi"}, {"content": [{"type": "text", "text": "x"}, {"type": kind}]}])
    assert not holds_media([{"content": "image"}, {"content": [{"type": "text", "text": "x"}]}, {"content": None}, 3])
