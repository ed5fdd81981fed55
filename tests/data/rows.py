"""Rows in the vsft schema, good and bad."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image

from llava_pipeline.data.images import MAX_BYTES
from llava_pipeline.data.record import Row

IMAGE, NOTHING = {"type": "image"}, {"type": "text", "text": " \n"}


def a_picture(shade: int = 0, size: tuple[int, int] = (16, 16), format: str = "PNG") -> bytes:
    """An encoded picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256, 90)).save(buffer, format)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def a_png(width: int, height: int, kind: int = 2, data: bytes = b"", before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever its data is, with chunks before and after the data.

    ``kind`` 2 is RGB, 3 has a palette.
    """
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(data)) + after + chunk(b"IEND", b"")


def says(role: str, text: str, *items: dict[str, Any]) -> dict[str, Any]:
    """One turn, ``items`` before its text."""
    return {"role": role, "content": [*items, {"type": "text", "text": text}]}


def a_row(picture: bytes | None = None, **changes: Any) -> Row:
    """A good row, with some of its fields changed."""
    messages = [says("user", "\nWhat color is it?", IMAGE), says("assistant", "red")]
    return {"id": "row", "messages": messages, "images": [{"bytes": picture or a_picture()}], **changes}


def a_talk(*texts: str) -> list[dict[str, Any]]:
    """A conversation about one picture: question, answer, question, ..."""
    roles = ("user", "assistant")
    turns = [says(roles[number % 2], text) for number, text in enumerate(texts)]
    turns[0]["content"].insert(0, IMAGE)
    return turns


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = "deep"
    for _ in range(depth):
        value = [value]
    return value


GOOD = a_row()["messages"]
TEXT_ONLY = a_row(images=[], messages=[says("user", "What?"), GOOD[1]])
BAD: dict[str, list[Row]] = {
    "malformed": [
        {},
        a_row(messages=None),
        a_row(messages="What?"),
        a_row(messages={"role": "user"}),
        a_row(messages=["What?", "red"]),
        a_row(messages=[{"role": "user"}, GOOD[1]]),
        a_row(messages=[{"role": 1, "content": "What?"}, GOOD[1]]),
        a_row(messages=[{"role": "user", "content": None}, GOOD[1]]),
        a_row(messages=[{"role": "user", "content": nested(50_000)}, GOOD[1]]),
        a_row(messages=[{"role": "user", "content": [{"type": "video"}]}, GOOD[1]]),
        a_row(messages=[{"role": "user", "content": [{"type": "text", "text": None}]}, GOOD[1]]),
        a_row(messages=[says("user", "half a pair: \ud83d", IMAGE), GOOD[1]]),
        a_row(id="\ud83d"),
        a_row(id=10**5000),
        a_row(id=["row"]),
        a_row(id="row" * 1000),
        a_row(images={"bytes": a_picture()}),
        a_row(images=a_picture()),
        a_row(images="a.png"),
        a_row(images=[None]),
        a_row(images=[[a_picture()]]),
        a_row(images=[{"bytes": None, "path": "a.png"}]),
        a_row(images=["a.png"]),
        a_row(kinds=5),
        a_row(kinds=[5]),
        a_row(kinds=["color", "shape"]),
    ],
    "no_messages": [a_row(messages=[]), a_row(messages=GOOD[:1])],
    "unknown_role": [
        a_row(messages=[says("USER", "What?", IMAGE), GOOD[1]]),
        a_row(messages=[GOOD[0], says("gpt", "red")]),
        a_row(messages=[*GOOD, says("", "And now?")]),
        a_row(messages=[says("\ud83d", "What?", IMAGE), GOOD[1]]),
    ],
    "system_turn": [
        a_row(messages=[says("system", "Be kind."), *GOOD]),
        a_row(messages=[GOOD[0], says("system", "Be kind."), GOOD[1]]),
    ],
    "roles_out_of_order": [
        a_row(messages=GOOD[::-1]),
        a_row(messages=[*GOOD, says("user", "And now?")]),
        a_row(messages=[GOOD[0], GOOD[0]]),
        a_row(messages=[*GOOD, GOOD[1]]),
    ],
    "empty_turn": [
        a_row(messages=[GOOD[0], {"role": "assistant", "content": []}]),
        a_row(messages=[GOOD[0], {"role": "assistant", "content": ""}]),
        a_row(messages=[GOOD[0], {"role": "assistant", "content": [NOTHING]}]),
        a_row(messages=[{"role": "user", "content": [IMAGE]}, GOOD[1]]),
    ],
    "image_count_mismatch": [
        a_row(images=[]),
        a_row(images=None),
        a_row(images=[a_picture(), a_picture(1)]),
        a_row(messages=[says("user", "What?", IMAGE, IMAGE), GOOD[1]]),
        a_row(messages=[says("user", "What?"), GOOD[1]]),
    ],
    "no_image": [TEXT_ONLY],
    "not_one_image": [
        a_row(images=[a_picture(), a_picture(1)], messages=[says("user", "What?", IMAGE, IMAGE), GOOD[1]]),
        a_row(images=[a_picture()] * 2, messages=[*GOOD, *GOOD]),
    ],
    "image_not_first": [
        a_row(messages=[says("user", "What?"), says("assistant", "red", IMAGE)]),
        a_row(messages=[says("user", "What?"), GOOD[1], *GOOD]),
    ],
    "text_too_long": [
        a_row(messages=[says("user", "What color? " * 900_000, IMAGE), GOOD[1]]),
        a_row(messages=[GOOD[0], says("assistant", " " * 10_000_000 + "red")]),
        a_row(messages=a_talk(*["a"] * 10_000)),
    ],
    "control_characters": [
        a_row(messages=[says("user", f"What{character}?", IMAGE), GOOD[1]])
        for character in ("\0", "\x07", "\x0b", "\x0c", "\x1b", "\x7f", "\x85", "\x9f")
    ],
    "special_token_in_text": [
        a_row(messages=[GOOD[0], says("assistant", f"red{token}")])
        for token in (
            *("<image>", "</s>", "<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>", "<|im_end|>"),
            *("<pad>", "<unk>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<|eot_id|>", "<|endoftext|>"),
            *("<\uff5cUser\uff5c>", "<__media__>"),
        )
    ],
    "image_too_many_bytes": [a_row(a_picture() + bytes(MAX_BYTES))],
    "image_unreadable": [
        a_row(b"no picture"),
        {**a_row(), "images": [b""]},
        a_row(a_picture()[:60]),
        a_row(a_picture(format="TIFF")),
        a_row(b"<!DOCTYPE html><title>404</title>"),
        a_row(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ],
    "image_too_many_pixels": [a_row(a_png(6400, 6400)), a_row(a_png(60_000, 60_000))],
    "image_too_small": [a_row(a_png(1, 20_000)), a_row(a_picture(size=(7, 7)))],
    "image_too_long": [a_row(a_picture(size=(8, 161)))],
    "too_many_tokens": [a_row(messages=[says("user", "What color? " * 400, IMAGE), GOOD[1]])],
}
"""Bad rows by their reason under a spec of 256 tokens that leaves the rest as it is.

All reasons but those of rows that a source cannot even read, ``answer_cut``, which wants
data.when_too_long=cut, and ``nothing_supervised``, which is a matter of the template.
"""
