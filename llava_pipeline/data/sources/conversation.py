"""A JSON object as a row: in the vsft schema (``messages``, ``images``), LLaVA's (``conversations``, ``image``), or
POPE's (``text``, ``label``, ``image``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from llava_pipeline.data.record import Malformed, Row
from llava_pipeline.data.sources.local import ScannedReader, image_folder, printable
from llava_pipeline.data.sources.reader import Broken, picture_below
from llava_pipeline.spec import JsonlSource, LlavaJsonSource, Split

MAX_JSON_BYTES = 64 << 20  # of one row, which is held in memory: room for 10 MB of text with every character escaped
MAX_PICTURES = 16  # of one row: more are not read into memory, for a row that no recipe takes
IMAGE = "<image>"
POPE_LABELS, YES_NO = ("yes", "no"), "yes/no"  # Li et al., 2023 (arXiv 2305.10355): one question about one object
BOM = b"\xef\xbb\xbf"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FindPictures = Callable[[list[Any]], "list[bytes] | Broken"]


class JsonReader(ScannedReader):
    """Files of JSON rows that name their pictures by path, from the spec's image folder or the file's own."""

    def __init__(self, source: JsonlSource | LlavaJsonSource, split: Split) -> None:
        self._images = image_folder(source.images)
        update = {"images": None if self._images is None else str(self._images)}
        super().__init__(source.model_copy(update=update), source.path, split)

    def image_folder(self, file: Path) -> Path:
        """Where the paths in a file's rows start."""
        return self._images or file.parent


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def row_of(data: bytes, default_id: str, folder: Path) -> Row | Broken:
    """One JSON object as a row whose pictures lie below ``folder``, or why it is none."""
    row_id, digest = default_id, hashlib.sha256(data).hexdigest()
    try:
        value = parse(data)
        row_id = id_of(value, default_id)
        found = row_of_object(value, row_id, lambda names: pictures_below(folder, names))
    except Malformed as error:
        found = Broken("malformed", printable(str(error)))
    if isinstance(found, Broken):
        return Broken(found.reason, printable(found.detail), printable(row_id), digest)
    return found


def row_of_object(value: dict[str, Any], row_id: str, find: FindPictures) -> Row | Broken:
    """An object as a row; ``find`` gives the bytes of the pictures that it names.

    Raises:
        Malformed: it is of neither schema.
    """
    if value.get("messages") is not None:
        messages, names = value["messages"], _names_in_vsft(value)
        markers = len(names)  # the checks count them; a reader only guards its memory
    elif value.get("conversations") is not None:
        messages, markers = turns_of(value["conversations"])
        names = _names_in_llava(value)
    elif isinstance(value.get("text"), str) and value.get("label") in POPE_LABELS:
        messages, markers, names = asked_and_told(value["text"], value["label"]), 1, _names_in_llava(value)
        value = {**value, "kinds": [YES_NO]}
    else:
        raise Malformed("neither messages nor conversations")
    if max(markers, len(names)) > MAX_PICTURES:
        reason = "not_one_image" if markers == len(names) else "image_count_mismatch"
        return Broken(reason, f"{markers} image markers, {len(names)} images")
    pictures = find(names)
    if isinstance(pictures, Broken):
        return pictures
    row: Row = {"id": row_id, "messages": messages, "images": [{"bytes": data} for data in pictures]}
    return row if value.get("kinds") is None else {**row, "kinds": value["kinds"]}


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object in some bytes.

    Raises:
        Malformed: they are no UTF-8, no JSON, no object; NaN and Infinity are no JSON either.
    """
    try:
        value = _JSON.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise Malformed("nested too deeply") from error
    except ValueError as error:
        raise Malformed(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Malformed(f"not an object but {type(value).__name__}")
    return value


def id_of(value: dict[str, Any], default: str) -> str:
    """An object's own name as text. One that is neither text nor a number is none."""
    own = value.get("id", value.get("question_id"))
    return str(own) if isinstance(own, (str, int, float)) and own != "" else default


def turns_of(conversations: Any) -> tuple[list[dict[str, Any]], int]:
    """LLaVA's turns as messages, and the number of image markers in them.

    Raises:
        Malformed: not a list of objects with ``from`` and ``value``.
    """
    if not isinstance(conversations, list):
        raise Malformed("conversations is not a list")
    for turn in conversations:
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            raise Malformed("a turn of conversations has no from or no value that is a text")
    markers = sum(turn["value"].count(IMAGE) for turn in conversations)
    if markers > MAX_PICTURES:  # not one object for each of a million
        return [], markers
    messages, seen = [], 0
    for turn in conversations:
        messages.append({"role": ROLES.get(turn["from"], turn["from"]), "content": content_of(turn["value"], seen)})
        seen += turn["value"].count(IMAGE)
    return messages, markers


def content_of(text: str, seen: int = 0) -> list[dict[str, Any]]:
    """A turn's text as items: every ``<image>`` an image item at its place, the newline beside it left in the text.

    ``seen`` is how many images came before; vsft rows number them.
    """
    items: list[dict[str, Any]] = []
    for number, part in enumerate(text.split(IMAGE)):
        if number:
            items.append({"index": seen + number - 1, "text": None, "type": "image"})
        if part:
            items.append({"index": None, "text": part, "type": "text"})
    return items


def asked_and_told(question: str, caption: str) -> list[dict[str, Any]]:
    """A conversation of one round about one picture."""
    return [
        {"role": "user", "content": content_of(f"{IMAGE}\n{question}")},
        {"role": "assistant", "content": [{"index": None, "text": caption, "type": "text"}]},
    ]


def pictures_below(folder: Path, names: list[Any]) -> list[bytes] | Broken:
    """The bytes of the pictures that a row names, or what is wrong with the first that cannot be had."""
    pictures = []
    for name in names:
        picture = picture_below(folder, name)
        if isinstance(picture, Broken):
            return picture
        pictures.append(picture)
    return pictures


def _names_in_vsft(value: dict[str, Any]) -> list[Any]:
    images = value.get("images")
    if images is None:
        return []
    if not isinstance(images, list):
        raise Malformed(f"images is not a list but {type(images).__name__}")
    return [item.get("path") if isinstance(item, dict) else item for item in images]


def _names_in_llava(value: dict[str, Any]) -> list[Any]:
    image = value.get("image")
    if image is None:
        return []
    if not isinstance(image, (str, list)):
        raise Malformed(f"image is neither a path nor a list of paths but {type(image).__name__}")
    return image if isinstance(image, list) else [image]
