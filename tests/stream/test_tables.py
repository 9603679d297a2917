"""Records to documents: which column, what is in it, and wikitext's articles."""

from __future__ import annotations

from typing import Any

import pytest

from qwench.errors import TextError
from qwench.stream.rows import Document
from qwench.stream.tables import articles, documents_of

CHAT = [{"role": "user", "content": "hi"}]


def read(*records: dict[str, Any], column: str | None = None) -> list[Document]:
    return list(documents_of([(f"t, line {i + 1}", record) for i, record in enumerate(records)], "t", column))


@pytest.mark.parametrize(
    ("record", "column", "expected"),
    [
        ({"id": "7", "text": "a", "messages": CHAT}, None, {"text": "a"}),
        ({"id": "7", "conversations": CHAT}, None, {"messages": tuple(CHAT)}),
        ({"id": 7, "story": "a"}, None, {"text": "a"}),
        ({"id": 7, "talk": CHAT}, None, {"messages": tuple(CHAT)}),
        ({"text": "a", "title": "b"}, "title", {"text": "b"}),
        ({"text": None, "n": 1}, None, {}),
    ],
)
def test_the_column_is_found_or_named(record: dict[str, Any], column: str | None, expected: dict[str, Any]) -> None:
    assert read(record, column=column) == [Document("t, line 1", **expected)]


def test_names_of_records() -> None:
    assert [d.name for d in read({"text": "a", "name": "first"}, {"text": "b", "name": 3})] == ["first", "t, line 2"]


@pytest.mark.parametrize(
    ("records", "column", "expected"),
    [
        ([{"text": "a", "body": "b"}], "txt", "t has no column 'txt' (did you mean 'text'?); it has text, body"),
        ([{"a": "x", "b": "y"}], None, "t has the columns a, b: which one is the text?"),
        ([{"a": 1, "b": 2}], None, "t has the columns a, b: which one is the text?"),
        ([{"text": "a"}, {"texts": "b"}], None, "t, line 2 has no column 'text' (did you mean 'texts'?)"),
        ([{"text": "a", "n": 1}, {"text": 5}], None, "t, line 2: column 'text' holds int"),
        ([{"text": ["a", "b"]}], None, "t, line 1: column 'text' holds list"),
        ([{"text": b"ab"}], None, "t, line 1: column 'text' holds bytes"),
        ([], None, "t is empty"),
    ],
)
def test_mistakes_name_the_place_and_the_columns(records: list[dict[str, Any]], column: str | None, expected: str) -> None:
    with pytest.raises(TextError) as caught:
        read(*records, column=column)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("beside", "media"),
    [
        ({"image": "cat.png"}, True),
        ({"images": ["cat.png"]}, True),
        ({"images": []}, False),
        ({"image": None}, False),
        ({"picture": {"bytes": b"x", "path": None}}, True),
        ({"pictures": [{"bytes": None, "path": "x.png"}]}, True),
        ({"origin": {"path": "x"}}, False),
    ],
)
def test_media_beside_the_text_are_seen(beside: dict[str, Any], media: bool) -> None:
    assert read({"text": "a", **beside})[0].media is media
    assert read({"messages": CHAT, **beside})[0].media is media


def test_media_in_messages_are_seen() -> None:
    assert read({"messages": [{"role": "user", "content": [{"type": "image"}]}]})[0].media


def test_articles_of_wikitext_are_put_together_again() -> None:
    lines = ["", " = First = \n", "", " One . \n", " = = Life = = \n", " Two . \n", " = Second = Third = \n", " Three . "]
    found = list(articles(Document("", line) for line in lines))
    assert [d.name for d in found] == ["First", "Second = Third"]
    assert found[0].text == " = First = \n\n One . \n = = Life = = \n Two . \n"
    assert found[1].text == " = Second = Third = \n Three . \n"


def test_wikitext_that_begins_in_an_article_or_has_none() -> None:
    found = list(articles([Document("", " tail . \n"), Document("", " = Head = \n"), Document("", " x \n")]))
    assert [d.name for d in found] == ["before the first heading", "Head"]
    assert list(articles([Document("", ""), Document("", " \n")])) == []
