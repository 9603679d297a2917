"""Conversations as the model will meet them: records of data sets -> messages -> the model's own chat template.

Data sets write conversations in two ways: `{"role": "user", "content": ...}` and `{"from": "human", "value": ...}`. They keep reasoning in a field of its own, or inside of the
answer between `<think>` and `</think>`. All become messages with a role and one string of content, reasoning inside: templates of reasoning models take it apart again, and those
of other models show it as it is.

    filled: the answer has its reasoning, and the template is told that thinking is on
    off:    the reasoning is taken out, and the template is told that thinking is off (it then writes the empty thought that the model sees when it does not think)

Templates drop the reasoning of all but the last turn, as they do in use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from qwench.stream.rows import Document

Thinking = Literal["filled", "off"]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
MEDIA_PARTS = {"image", "image_url", "video", "video_url", "audio", "input_audio", "audio_url"}
MEDIA_MARK = re.compile(r"<(?:image|video|audio)>\n?")
"""Where a medium stood, in data sets that keep it in a column of its own."""
IMAGE_MARK = re.compile(r"<image>\n?")
PLACE = "\ufffc"
"""Where an image stands in a text: Unicode's own character for that."""
IMAGE_PARTS = {"image", "image_url"}
KEPT = ("tool_calls", "name", "tool_call_id")


def render(tokenizer: Any, document: Document, thinking: Thinking, images: bool = False) -> str:
    """The text of a conversation, without its images; or with the template's mark at the place of each.

    Raises ValueError where a message or the template makes no sense, or there are other images than places for them.
    """
    plain = [_message(message, thinking) for message in document.messages]
    if images and document.images:
        plain = with_image_parts(plain, len(document.images))
    elif document.media:
        plain = [message | {"content": MEDIA_MARK.sub("", message["content"]).replace(PLACE, "")} for message in plain]
    try:
        text: str = tokenizer.apply_chat_template(plain, tokenize=False, enable_thinking=thinking == "filled")
    except Exception as error:  # templates are programs: they raise what they like
        raise ValueError(f"the chat template says: {error}") from error
    return text


def with_image_parts(messages: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Messages whose images are parts of their content, as templates want them. Where nothing says where they stand, they come before what the user says first.

    Raises ValueError where there are places for more or fewer than `count` images.
    """
    marked = [message | {"content": IMAGE_MARK.sub(PLACE, message["content"])} for message in messages]
    places = sum(message["content"].count(PLACE) for message in marked)
    if not places:
        first = next((number for number, message in enumerate(marked) if message["role"] == "user"), 0)
        marked[first] = marked[first] | {"content": PLACE * count + marked[first]["content"]}
    elif places != count:
        raise ValueError(f"{count} images for {places} places")
    return [message | {"content": _split(message["content"])} for message in marked]


def _split(content: str) -> str | list[dict[str, str]]:
    if PLACE not in content:
        return content
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(PLACE)):
        parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
    return parts


def holds_media(messages: Sequence[Any], kinds: Collection[str] = MEDIA_PARTS) -> bool:
    """Whether a conversation has images, video or sound in it."""
    parts = [part for message in messages if isinstance(message, Mapping) for part in _parts(message)]
    return any(isinstance(part, Mapping) and part.get("type") in kinds for part in parts)


def without_images(messages: Sequence[Mapping[str, Any]]) -> tuple[tuple[dict[str, Any], ...], list[object]]:
    """Messages whose image parts say no more than that they are images; and what each of these parts said, None where that was nothing."""
    images: list[object] = []

    def bare(part: object) -> object:
        if not isinstance(part, Mapping) or part.get("type") not in IMAGE_PARTS:
            return part
        images.append(next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key)), None))
        return {"type": "image"}

    found = []
    for message in messages:
        key = "content" if "content" in message else "value"
        content = message.get(key)
        found.append(dict(message) | ({key: [bare(p) for p in content]} if isinstance(content, list | tuple) else {}))
    return tuple(found), images


def looks_like_chat(value: object) -> bool:
    """Whether a column's value is a conversation."""
    return (
        isinstance(value, Sequence)
        and len(value) > 0
        and isinstance(value[0], Mapping)
        and bool({"role", "from"} & {*value[0]})
    )


def _message(message: Mapping[str, Any], thinking: Thinking) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is {type(message).__name__}, not a role with content")
    role = _role(message)
    content = "".join(_text(part) for part in _parts(message))
    if role == "assistant":
        content = _with_reasoning(message, content, thinking)
    kept = {key: message[key] for key in KEPT if message.get(key)}
    if "tool_calls" in kept:
        kept["tool_calls"] = [_tool_call(call) for call in kept["tool_calls"]]
    return {"role": role, "content": content, **kept}


def _role(message: Mapping[str, Any]) -> str:
    if message.get("role"):
        return str(message["role"])
    speaker = str(message.get("from"))
    if speaker not in ROLES:
        raise ValueError(f"a message is from {speaker!r}; known: {', '.join(ROLES)}")
    return ROLES[speaker]


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content") if "content" in message else message.get("value")
    if content is None:
        return []
    return content if isinstance(content, list | tuple) else [content]


def _text(part: object) -> str:
    """The text of one part of a message; an image is the mark of its place, other media have none."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        if part.get("type") in IMAGE_PARTS:
            return PLACE
        return "" if part.get("type") in MEDIA_PARTS else str(part.get("text") or "")
    raise ValueError(f"a part of a message is {type(part).__name__}, neither text nor image")


def _with_reasoning(message: Mapping[str, Any], content: str, thinking: Thinking) -> str:
    """An answer with its reasoning in front, or without it, wherever the data has it."""
    before, mark, after = content.partition("</think>")
    answer, reasoning = (after.lstrip("\n"), before.strip().removeprefix("<think>").strip()) if mark else (content, "")
    reasoning = next((str(message[key]) for key in REASONING if message.get(key)), reasoning).strip("\n")
    return f"<think>\n{reasoning}\n</think>\n\n{answer}" if reasoning and thinking == "filled" else answer


def _tool_call(call: Any) -> Any:
    """Arguments as a mapping: data sets hold them as JSON text, Qwen's templates loop over them."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        return call
