"""Parquet files in the vsft schema. A shard is a row group, because that is what can be read on its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types

from llava_pipeline.contracts import Cursor, Piece
from llava_pipeline.data.record import Row
from llava_pipeline.data.sources.local import (
    absolute,
    check_behind,
    find_files,
    printable,
    refuse_shrunk,
    unreadable,
)
from llava_pipeline.data.sources.reader import PIECE_ROWS, Broken, digest_of_files, windows
from llava_pipeline.spec import ParquetSource, Source, Split, shards_in

COLUMNS = ("id", "messages", "images", "kinds")
BATCH_BYTES = 16 << 20  # about what is decoded at a time
BUFFER_BYTES = 1 << 20  # read at a time and column; without, a row group's whole column is read at once


@dataclass(frozen=True, slots=True)
class Group:
    """A row group; or a file that has none that can be read, as one row that is refused."""

    path: Path
    file: int  # number of the file
    index: int  # within the file
    first: int  # row of the file
    num_rows: int
    batch: int  # rows decoded at a time: a power of 2, so that pieces end where batches do
    reason: str = ""  # why all of its rows are refused
    detail: str = ""


@dataclass(slots=True)
class Batches:
    """A row group that is being decoded."""

    shard: int
    row: int  # first row of the next batch
    batches: Iterator[Any]


class ParquetReader:
    """Files there or in the folder ``data``, as the hub has them."""

    def __init__(self, source: ParquetSource, split: Split) -> None:
        root = absolute(source.path)
        self.files, self.has_split = find_files(root, split, ".parquet", shards_in)
        self.source: Source = source.model_copy(update={"path": str(root)})
        self.origin = f"{source.kind}:{root.name}/{split}"
        self._left_open = threading.local()

    @cached_property
    def groups(self) -> list[Group]:
        """All row groups in order, from the files' footers.

        Raises:
            SourceUnavailable: a file cannot be opened.
        """
        return [group for number, path in enumerate(self.files) for group in groups_of(path, number)]

    def pieces(self, start: Cursor) -> Iterator[Piece]:
        """What there is from a place on."""
        check_behind(self.origin, start, self.behind(start.shard))
        for shard in range(start.shard, len(self.groups)):
            group = self.groups[shard]
            name, row = f"{group.path.name}, row group {group.index}", 0
            if shard == start.shard:
                refuse_shrunk(name, start, group.num_rows)
                row = start.row
            yield from windows(shard, name, group.num_rows, row)

    def rows(self, piece: Piece) -> Iterator[Row | Broken]:
        """The rows of a piece; what cannot be decoded is refused row by row."""
        group, number = self.groups[piece.shard], piece.start
        stop = group.num_rows if piece.stop is None else piece.stop
        broken = Broken(group.reason, group.detail)
        if not group.reason:
            try:
                for values in self._values(piece.shard, number, stop):
                    yield self._row(values, self._id(group, number))
                    number += 1
                broken = Broken("shard_unreadable", f"{group.path.name} has fewer rows than its footer says")
            except (pa.ArrowException, OSError) as error:
                broken = Broken("shard_unreadable", _told(group.path, error))
        for row in range(number, stop):
            yield replace(broken, id=self._id(group, row))

    def _values(self, shard: int, start: int, stop: int) -> Iterator[dict[str, Any] | None]:
        """Rows as Python has them, None for one that it cannot have.

        A row group can be decoded from its beginning only. So each thread keeps the one where its last piece ended
        open, and goes on there if its next piece lies behind.
        """
        left: Batches | None = getattr(self._left_open, "batches", None)
        self._left_open.batches = None  # two pieces read at a time must not share one
        if left is None or left.shard != shard or left.row > start:
            left = Batches(shard, 0, _batches(self.groups[shard]))
        for batch in left.batches:
            first, left.row = left.row, left.row + batch.num_rows
            if left.row > start:
                yield from _python(batch.slice(max(0, start - first), min(stop, left.row) - max(start, first)))
            if left.row >= stop:
                break
        self._left_open.batches = left

    def _row(self, values: dict[str, Any] | None, row_id: str) -> Row | Broken:
        if values is None:
            return Broken("malformed", "a text is not UTF-8", row_id)
        own, images = values.get("id"), values.get("images")
        row: Row = {"id": row_id if own in (None, "") else str(own), "messages": values["messages"], "images": []}
        if images is not None:
            row["images"] = [{"bytes": i.get("bytes")} if isinstance(i, dict) else i for i in images]
        return row if values.get("kinds") is None else {**row, "kinds": values["kinds"]}

    def _id(self, group: Group, number: int) -> str:
        return f"{self.origin}/{group.path.name}/{group.first + number}"

    def num_rows(self) -> int:
        """Rows in all, as the footers have it."""
        return sum(group.num_rows for group in self.groups)

    def num_before(self, place: Cursor) -> int:
        """Rows before a place."""
        return sum(group.num_rows for group in self.groups[: place.shard]) + place.row

    def behind(self, shard: int) -> str:
        """Digest of the names and sizes of the files before the one with a row group."""
        return digest_of_files(self.files[: self.groups[shard].file if shard < len(self.groups) else None])


def groups_of(path: Path, file: int) -> list[Group]:
    """The row groups of a file.

    Raises:
        SourceUnavailable: it cannot be opened.
    """
    try:
        with pq.ParquetFile(path) as parquet:
            footer, drift = parquet.metadata, drift_of(parquet.schema_arrow)
            sizes = [
                (footer.row_group(n).num_rows, footer.row_group(n).total_byte_size)
                for n in range(footer.num_row_groups)
            ]
        if min((rows for rows, _ in sizes), default=0) < 0 or sum(rows for rows, _ in sizes) != footer.num_rows:
            raise pa.ArrowInvalid("the footer contradicts itself about the number of rows")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        return [Group(path, file, 0, 0, 1, 1, "shard_unreadable", _told(path, error))]
    groups, first = [], 0
    for index, (rows, num_bytes) in enumerate(sizes):
        batch = max(1, min(PIECE_ROWS, BATCH_BYTES * rows // max(1, num_bytes)))
        batch = 1 << (batch.bit_length() - 1)
        groups.append(Group(path, file, index, first, rows, batch, "schema_drift" if drift else "", drift))
        first += rows
    return groups


def drift_of(schema: pa.Schema) -> str:
    """In what a file's schema differs from the vsft one; empty where it does not."""
    for name, fits in (("messages", _is_messages), ("images", _is_images)):
        if name not in schema.names:
            return f"there is no column {name}; the columns are {printable(', '.join(schema.names))}"
        try:
            found = schema.field(name).type
        except KeyError:
            return f"there are several columns {name}"
        if not fits(found):
            return printable(f"{name} is {found}")
    return ""


def _is_messages(found: Any) -> bool:
    message = _item(found)
    if message is None or not _is_text(_field(message, "role")):
        return False
    content = _field(message, "content")
    return _is_text(content) or _is_text(_field(_item(content), "type"))


def _is_images(found: Any) -> bool:
    image = _item(found)
    return types.is_null(found) or (image is not None and any(_is_bytes(i) for i in (image, _field(image, "bytes"))))


def _item(found: Any) -> Any:
    """Type of a list's items; None where it is no list."""
    if found is None or not (types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)):
        return None
    return found.value_type


def _field(found: Any, name: str) -> Any:
    """Type of a field; None where there is none."""
    if found is None or not types.is_struct(found) or found.get_field_index(name) < 0:
        return None
    return found.field(name).type


def _is_text(found: Any) -> bool:
    if found is not None and types.is_dictionary(found):
        found = found.value_type
    return found is not None and (types.is_string(found) or types.is_large_string(found))


def _is_bytes(found: Any) -> bool:
    """Also of no type at all: a column of lists of which none holds anything."""
    return found is not None and (types.is_binary(found) or types.is_large_binary(found) or types.is_null(found))


def _batches(group: Group) -> Iterator[Any]:
    """The known columns of a row group, batch after batch."""
    with pq.ParquetFile(group.path, buffer_size=BUFFER_BYTES, page_checksum_verification=True) as file:
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        yield from file.iter_batches(group.batch, row_groups=[group.index], columns=columns, use_threads=False)


def _python(batch: Any) -> Iterator[dict[str, Any] | None]:
    """A batch's rows as dicts. A text that is not UTF-8 spoils its own row only."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                (row,) = batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError:
                row = None
            yield row


def _told(path: Path, error: Exception) -> str:
    """What Arrow found in a file.

    Raises:
        SourceUnavailable: it is not the file's fault: the system does not give it.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise unreadable(path, error) from error
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{path.name}: {printable(words)}"
