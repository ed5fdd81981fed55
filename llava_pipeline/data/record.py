"""The one normalised record behind every source, in the schema of ``HuggingFaceH4/llava-instruct-mix-vsft``.

A row has ``messages`` (each a role and a list of text and image items) and ``images``; ours adds ``id`` and, where
the source knows it, the ``kinds`` of its questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

Row = dict[str, Any]
MAX_ID_CHARACTERS = 1000


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
    def texts(self) -> list[str]:
        """What every turn says, in order: its text items joined, with the white space around them."""
        return ["".join(item["text"] for item in m["content"] if item["type"] == "text") for m in self.messages]

    @property
    def num_rounds(self) -> int:
        """Questions with an answer."""
        return len(self.messages) // 2

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(question, answer) of every round."""
        texts = [text.strip() for text in self.texts]
        return list(zip(texts[::2], texts[1::2], strict=True))

    def first(self, num_rounds: int) -> Record:
        """The same conversation, ended after so many rounds."""
        return replace(self, messages=self.messages[: 2 * num_rounds], kinds=self.kinds[:num_rounds])


def turn(role: str, text: str, with_image: bool = False) -> dict[str, Any]:
    """One message in the vsft format; a picture stands first and a line break behind it, as LLaVA writes them."""
    content: list[dict[str, Any]] = [{"index": 0, "text": None, "type": "image"}] if with_image else []
    prefix = "\n" if with_image else ""
    return {"role": role, "content": [*content, {"index": None, "text": prefix + text, "type": "text"}]}


class Malformed(Exception):
    """A row that is not even a record."""


def normalise(row: object) -> Record:
    """A source's row as a record. Text items that are empty are left out: no template writes anything for them.

    Raises:
        Malformed: a field is missing or of another type. Nothing else, whatever the row is.
    """
    if not isinstance(row, dict):
        raise Malformed(f"a row is {_kind(row)}, not an object")
    messages, kinds = row.get("messages"), _list(row, "kinds")
    if not isinstance(messages, list):
        raise Malformed(f"messages is {_kind(messages)}, not a list of objects")
    out = [_message(number, message) for number, message in enumerate(messages)]
    if kinds and (len(kinds) * 2 != len(out) or not all(isinstance(kind, str) for kind in kinds)):
        raise Malformed(f"kinds is {len(kinds)} items for {len(out)} messages, not one name per question")
    images = [_bytes(image) for image in _list(row, "images")]
    return Record(_id(row.get("id")), out, images, [_text(kind) for kind in kinds])


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _list(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise Malformed(f"{key} is {_kind(value)}, not a list")
    return value


def _message(number: int, message: object) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Malformed(f"message {number} is {_kind(message)}, not an object")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(role, str) or not isinstance(content, list):
        raise Malformed(
            f"message {number} needs a text as its role and a list as its content, not {_kind(role)} and "
            f"{_kind(content)}"
        )
    items = [_item(number, item) for item in content]
    return {"role": role, "content": [item for item in items if item["type"] == "image" or item["text"]]}


def _item(number: int, item: object) -> dict[str, Any]:
    if isinstance(item, dict) and item.get("type") == "image":
        return {"type": "image"}
    if isinstance(item, dict) and item.get("type") == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": _text(item["text"])}
    raise Malformed(f"message {number} has a content item that is neither text nor image")


def _text(text: str) -> str:
    """The text itself, unless it holds half a surrogate pair, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"a text is not valid Unicode: U+{ord(text[error.start]):04X} in it is half a pair") from error
    return text


def _id(value: object) -> str:
    """A row's id as text; empty where it has none, which tables write as NaN."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, int) and value.bit_length() > 64:
        raise Malformed(f"the id is a number of {value.bit_length()} bits")
    if not isinstance(value, str | int | float):
        raise Malformed(f"the id is {_kind(value)}, neither a text nor a number")
    text = str(value)
    if len(text) > MAX_ID_CHARACTERS:
        raise Malformed(f"the id has {len(text)} characters, at most {MAX_ID_CHARACTERS}")
    return _text(text)


def _bytes(image: object) -> bytes:
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise Malformed(f"an image is {_kind(data)}, not bytes")
    return data
