"""JSON lines: one row a line, in the vsft schema or LLaVA's, pictures named by path."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llava_pipeline.data.record import Row
from llava_pipeline.data.sources.conversation import BOM, MAX_JSON_BYTES, JsonReader, row_of
from llava_pipeline.data.sources.reader import Broken


class JsonlReader(JsonReader):
    """Lines that hold nothing are no rows."""

    kind = ".jsonl"

    def offsets(self, file: BinaryIO) -> Iterator[int]:
        """Where each line begins."""
        return (offset for offset, _ in lines(file))

    def read(self, file: BinaryIO, offset: int, number: int, path: Path) -> Iterator[Row | Broken]:
        """Rows from a line on."""
        folder = self.image_folder(path)
        for here, (_, line) in enumerate(lines(file, offset), number):
            row_id = self.id_of(path, here)
            if len(line) > MAX_JSON_BYTES:
                digest = hashlib.sha256(line).hexdigest()
                yield Broken("malformed", f"a line of more than {MAX_JSON_BYTES} bytes", row_id, digest)
            else:
                yield row_of(line, row_id, folder)


def lines(file: BinaryIO, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Every line that holds something, with its place; of one that is too long, its first bytes, one too many."""
    file.seek(offset)
    while line := file.readline(MAX_JSON_BYTES + 1):
        here, offset = offset, offset + len(line)
        rest = line
        while len(rest) > MAX_JSON_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_JSON_BYTES + 1)
            offset += len(rest)
        content = (line.removeprefix(BOM) if here == 0 else line).removesuffix(b"\n")
        if len(content) > MAX_JSON_BYTES or content.strip():
            yield here, content
