"""One row through every check: accepted with its tokens and its picture's fingerprint, or refused with one reason."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate

from llava_pipeline.data import checks
from llava_pipeline.data.fingerprint import Fingerprint, fingerprint
from llava_pipeline.data.images import ImageRefused, decode
from llava_pipeline.data.record import Malformed, Record, Row, normalise
from llava_pipeline.data.sources.reader import Broken
from llava_pipeline.model.processor import Encoded, Processor
from llava_pipeline.spec import DataSpec

MAX_DETAIL = 300
PICTURES_REMEMBERED = 512


class RowRefused(Exception):
    """A row that is not kept, with its reason and a detail for people: one printable line.

    ``digest`` is the sha256 of its picture's bytes, or where it has none of the row as JSON with sorted keys; empty
    for a row that cannot be written as JSON.
    """

    def __init__(self, reason: str, detail: str, digest: str = ""):
        super().__init__(reason, detail, digest)
        self.reason, self.detail, self.digest = reason, printable(detail), digest

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Accepted:
    """A row that passed every check that needs no other row."""

    record: Record
    encoded: Encoded
    picture: Fingerprint | None  # None: a conversation without a picture


def examine(row: Row | Broken, processor: Processor, spec: DataSpec) -> Accepted:
    """The accepted row.

    Raises:
        RowRefused: the first reason for which it is not kept. Nothing else, whatever the row is.
    """
    if isinstance(row, Broken):
        raise RowRefused(row.reason, row.detail, row.digest)
    try:
        record = _readable(row, processor, spec)
        picture = look(record.images[0]) if record.images else None
        record, encoded = _encoded(record, processor, spec)
    except Malformed as error:
        raise RowRefused("malformed", str(error), digest_of(row)) from error
    except ImageRefused as error:
        raise RowRefused(error.reason, error.detail, digest_of(row)) from error
    except RowRefused as refusal:
        raise RowRefused(refusal.reason, refusal.detail, digest_of(row)) from None
    return Accepted(record, encoded, picture)


def _readable(row: Row, processor: Processor, spec: DataSpec) -> Record:
    """The record, once its structure and its text are as they should be."""
    record = normalise(row)
    for reason, check in checks.STRUCTURE.items():
        if not (reason == "no_image" and spec.text_only == "keep"):
            refuse_if(reason, check(record))
    if spec.when_too_long == "cut":
        record = record.first(rounds_worth_tokenising(record, spec.max_tokens))
    refuse_if("text_too_long", checks.text_too_long(record, spec.max_tokens))
    refuse_if("control_characters", checks.control_characters(record))
    refuse_if("special_token_in_text", checks.special_token_in_text(record, processor.special_tokens))
    return record


def _encoded(record: Record, processor: Processor, spec: DataSpec) -> tuple[Record, Encoded]:
    """The record, shortened where the spec says so, and its tokens."""
    encoded = processor.encode(record.messages)
    if spec.when_too_long == "cut" and len(encoded.input_ids) > spec.max_tokens:
        num_rounds = rounds_that_fit(record, processor, spec.max_tokens)
        record = record.first(max(1, num_rounds))
        encoded = processor.encode(record.messages)
        refuse_if("answer_cut", checks.answer_cut(encoded, spec.max_tokens))
    refuse_if("too_many_tokens", checks.too_many_tokens(encoded, spec.max_tokens))
    refuse_if("nothing_supervised", checks.nothing_supervised(encoded))
    return record, encoded


def refuse_if(reason: str, detail: str | None) -> None:
    """Refuse with this reason where a check found something."""
    if detail is not None:
        raise RowRefused(reason, detail)


# --------------------------------------------------------------------------------------------- cutting


def rounds_worth_tokenising(record: Record, max_tokens: int) -> int:
    """How many of the first rounds the cap on text lets through; at least one, which the check then refuses."""
    sizes = accumulate(len(text.encode()) for text in record.texts)
    most = checks.MAX_BYTES_PER_TOKEN * max_tokens
    num_turns = sum(1 for size in sizes if size <= most)
    return max(1, min(num_turns, max_tokens) // 2)


def rounds_that_fit(record: Record, processor: Processor, max_tokens: int) -> int:
    """The most whole rounds, from the first, that take at most so many tokens; 0 where not even one does."""

    def num_tokens(num_rounds: int) -> int:
        return len(processor.encode(record.first(num_rounds).messages).input_ids)

    return bisect_right(range(1, record.num_rounds + 1), max_tokens, key=num_tokens)


# --------------------------------------------------------------------------------------------- pictures

_pictures: OrderedDict[bytes, Fingerprint | tuple[str, str]] = OrderedDict()
_looking = threading.Lock()


def look(data: bytes) -> Fingerprint:
    """The fingerprint of a picture, decoded once; the latest pictures of this process are known by their bytes.

    Raises:
        ImageRefused: the image gate does not accept it.
    """
    digest = hashlib.sha256(data).digest()
    with _looking:
        found = _pictures.get(digest)
        if found is not None:
            _pictures.move_to_end(digest)
    if found is None:
        found = _look(data)
        with _looking:
            _pictures[digest] = found
            while len(_pictures) > PICTURES_REMEMBERED:
                _pictures.popitem(last=False)
    if isinstance(found, tuple):
        raise ImageRefused(*found)
    return found


def _look(data: bytes) -> Fingerprint | tuple[str, str]:
    """The fingerprint, or reason and detail: an exception would keep the picture alive with its frames."""
    try:
        return fingerprint(decode(data))
    except ImageRefused as refusal:
        return refusal.reason, refusal.detail


# --------------------------------------------------------------------------------------------- what is told


def printable(text: str) -> str:
    """One line of at most ``MAX_DETAIL`` characters: what cannot be printed is escaped, memory addresses go."""
    text = re.sub(r"0x[0-9a-fA-F]+", "0x...", text[: 4 * MAX_DETAIL])
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= MAX_DETAIL else shown[: MAX_DETAIL - 3] + "..."


def digest_of(row: object) -> str:
    """What a refused row is found again by."""
    images = row.get("images") if isinstance(row, dict) else None
    for image in images if isinstance(images, list) else []:
        data = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(data, bytes):
            return hashlib.sha256(data).hexdigest()
    try:
        text = json.dumps(row, sort_keys=True, default=_as_json)
    except (TypeError, ValueError, RecursionError):  # keys of several kinds, a loop or a number of 5,000 digits, depth
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


def _as_json(value: object) -> str:
    """What JSON has no form for: bytes by their digest, anything else by its type."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else type(value).__name__
