"""The one normalised record behind every source, in the schema of ``HuggingFaceH4/llava-instruct-mix-vsft``.

A row has ``messages`` (each a role and a list of text and image items) and ``images``; ours adds ``id`` and, where
the source knows it, the ``kinds`` of its questions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """A row whose messages have the right types; nothing else has been checked yet."""

    id: str
    messages: list[dict[str, Any]]
    images: list[bytes]
    kinds: list[str] = field(default_factory=list)

    @property
    def num_markers(self) -> int:
        """Image items in all messages."""
        return sum(item["type"] == "image" for message in self.messages for item in message["content"])

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(question, answer) of every round."""
        texts = [
            "".join(item["text"] for item in m["content"] if item["type"] == "text").strip() for m in self.messages
        ]
        return list(zip(texts[::2], texts[1::2], strict=True))


class Malformed(Exception):
    """A row that is not even a record."""


def normalise(row: Row) -> Record:
    """A source's row as a record.

    Raises:
        Malformed: a field is missing or of another type.
    """
    messages, kinds = row.get("messages"), _list(row, "kinds")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Malformed("messages is not a list of objects")
    out = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(role, str) or not isinstance(content, list):
            raise Malformed("a message needs a role and a content")
        out.append({"role": role, "content": [_item(item) for item in content]})
    if kinds and (len(kinds) * 2 != len(out) or not all(isinstance(kind, str) for kind in kinds)):
        raise Malformed("kinds is not one name per question")
    return Record(
        _text(str(row.get("id", ""))), out, [_bytes(i) for i in _list(row, "images")], [_text(k) for k in kinds]
    )


def _list(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise Malformed(f"{key} is not a list")
    return value


def _item(item: Any) -> dict[str, Any]:
    if isinstance(item, dict) and item.get("type") == "image":
        return {"type": "image"}
    if isinstance(item, dict) and item.get("type") == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": _text(item["text"])}
    raise Malformed("a content item is neither text nor image")


def _text(text: str) -> str:
    """The text itself, unless it holds half a surrogate pair, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Malformed("a text is not valid Unicode") from error
    return text


def _bytes(image: Any) -> bytes:
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise Malformed("an image is not bytes")
    return data
