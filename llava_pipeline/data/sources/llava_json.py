"""The original LLaVA format: one JSON array of objects. It is read by elements, never whole.

An element's ends are found by its brackets and quotes alone, so one that is damaged inside is one refused row, and
the next ones are read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llava_pipeline.data.record import Row
from llava_pipeline.data.sources.conversation import BOM, MAX_JSON_BYTES, JsonReader, row_of
from llava_pipeline.data.sources.reader import Broken

CHUNK = 1 << 18
WHITESPACE = b" \t\r\n"
_REST_OF_STRING = rb'[^"\\]*+(?:\\.[^"\\]*+)*+'
INSIDE = re.compile(_REST_OF_STRING, re.DOTALL)
BETWEEN = re.compile(rb'"' + _REST_OF_STRING + rb'"|["\[\]{},]', re.DOTALL)  # a lone quote: its string goes on
DEEPER = re.compile(rb'"' + _REST_OF_STRING + rb'"|["\[\]{}]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Element:
    """An element of the array with its place, or what is wrong with the file from there on."""

    offset: int
    data: bytes  # at most one byte more than ``MAX_JSON_BYTES``
    reason: str = ""
    detail: str = ""


class LlavaJsonReader(JsonReader):
    """One array, or a folder of files with one each."""

    kind = ".json"

    def offsets(self, file: BinaryIO) -> Iterator[int]:
        """Where each element begins."""
        return (element.offset for element in elements(file))

    def read(self, file: BinaryIO, offset: int, number: int, path: Path) -> Iterator[Row | Broken]:
        """Rows from an element on."""
        folder = self.image_folder(path)
        for here, element in enumerate(elements(file, offset), number):
            row_id = self.id_of(path, here)
            if element.reason:
                yield Broken(element.reason, element.detail, row_id, hashlib.sha256(element.data).hexdigest())
            else:
                yield row_of(element.data, row_id, folder)


def elements(file: BinaryIO, offset: int = 0) -> Iterator[Element]:
    """The elements of the array from a place on; 0 is the beginning of the file, any other lies within the array."""
    file.seek(offset)
    if offset == 0:
        begin = file.read(CHUNK)
        head = begin.removeprefix(BOM).lstrip(WHITESPACE)
        if not head.startswith(b"["):
            found = f"begins with {head[:20]!r}" if head else "is empty"
            yield Element(0, begin, "shard_unreadable", f"no JSON array: the file {found}")
            return
        offset = len(begin) - len(head) + 1
        file.seek(offset)
    yield from _Scan(file, offset).elements()


class _Scan:
    """Where one is within the array. ``depth`` is 0 between its elements' own brackets."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self.file, self.offset = file, offset  # of the chunk's first byte
        self.depth, self.in_string, self.escaped = 0, False, False
        self.kept, self.began = bytearray(), offset

    def elements(self) -> Iterator[Element]:
        while chunk := self.file.read(CHUNK):
            position = begin = 0  # ``begin``: of what belongs to the current element and has not been kept yet
            while (mark := self._next_mark(chunk, position)) >= 0:
                position = mark + 1
                if chunk[mark] in b",]":
                    self._keep(chunk, begin, mark)
                    yield from self._element()
                    begin = position
                if chunk[mark] in b"]":
                    yield from self._after(mark)
                    return
            self._keep(chunk, begin, len(chunk))
            self.offset += len(chunk)
        yield Element(self._place(), bytes(self.kept), "shard_unreadable", "the file ends within the array")

    def _next_mark(self, chunk: bytes, position: int) -> int:
        """Position of the next comma between elements, or of the array's end; -1 where the chunk has none."""
        while True:
            if self.in_string:
                position += self.escaped
                end = _end(INSIDE, chunk, position)
                self.in_string = end >= len(chunk) or chunk[end : end + 1] == b"\\"
                self.escaped = end < len(chunk) and self.in_string
                if self.in_string:
                    return -1
                position = end + 1
            match = (DEEPER if self.depth else BETWEEN).search(chunk, position)
            if match is None:
                return -1
            position, token = match.end(), match[0]
            if token in (b"[", b"{"):
                self.depth += 1
            elif token == b'"':
                self.in_string = True
            elif self.depth and token in (b"]", b"}"):
                self.depth -= 1
            elif token in (b",", b"]"):
                return match.start()

    def _keep(self, chunk: bytes, begin: int, end: int) -> None:
        """Take bytes into the current element, up to one too many, and remember where its first one lies."""
        data = chunk[begin:end]
        if not self.kept:
            data = data.lstrip(WHITESPACE)
            self.began = self.offset + end - len(data)
        self.kept += data[: MAX_JSON_BYTES + 1 - len(self.kept)]

    def _place(self) -> int:
        return self.began if self.kept else self.offset

    def _element(self) -> Iterator[Element]:
        """The element that has just ended. Nothing between two commas is none."""
        data = bytes(self.kept)
        self.kept.clear()
        if len(data) > MAX_JSON_BYTES:
            yield Element(self.began, data, "malformed", f"an element of more than {MAX_JSON_BYTES} bytes")
        elif data := data.rstrip(WHITESPACE):
            yield Element(self.began, data)

    def _after(self, mark: int) -> Iterator[Element]:
        """What follows the array's end is one refused row, whose place is that end."""
        end = self.offset + mark
        self.file.seek(end + 1)
        while chunk := self.file.read(CHUNK):
            if rest := chunk.lstrip(WHITESPACE):
                yield Element(end, rest, "shard_unreadable", f"the file goes on behind its array: {rest[:20]!r}")
                return


def _end(pattern: re.Pattern[bytes], chunk: bytes, position: int) -> int:
    match = pattern.match(chunk, position)
    return position if match is None else match.end()
