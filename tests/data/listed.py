"""A source that is a list of rows, and the way of its rows through the checks into a snapshot."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llava_pipeline.contracts import CheckedPiece, Cursor, Piece, Snapshot
from llava_pipeline.data import parts
from llava_pipeline.data.fingerprint import SeenPictures
from llava_pipeline.data.record import Row
from llava_pipeline.data.snapshot import take
from llava_pipeline.data.sources.reader import PIECE_ROWS, Broken
from llava_pipeline.model.processor import Processor
from llava_pipeline.spec import DataSpec, ScenesSource, Split
from llava_pipeline.store import home

ORIGIN = "rows/train"


class Listed:
    """Rows handed over by a test; they are taken once and in order, as from a stream."""

    source = ScenesSource()
    origin = ORIGIN

    def __init__(self, rows: Iterable[Row | Broken], has_split: bool = True) -> None:
        self.all = iter(rows)
        self.has_split = has_split

    def pieces(self, start: Cursor) -> Iterator[Piece]:
        """One after the other, as long as there are rows."""
        for first in itertools.count(start.row, PIECE_ROWS):
            if (row := next(self.all, None)) is None:
                return
            self.all = itertools.chain([row], self.all)
            yield Piece(shard=0, name=self.origin, start=first, stop=first + PIECE_ROWS)

    def rows(self, piece: Piece) -> Iterator[Row | Broken]:
        """The next rows."""
        return itertools.islice(self.all, piece.num_rows)

    def num_rows(self) -> int | None:
        """Nobody knows."""
        return None

    def num_before(self, place: Cursor) -> int | None:
        """Rows before a place."""
        return place.row

    def behind(self, shard: int) -> str:
        """Nothing is."""
        return ""


def a_spec(max_rejected_share: float = 1.0, **changes: Any) -> DataSpec:
    """Rules for rows of a test: any share may be refused, unless it says otherwise."""
    asked = {"source": ScenesSource(), "max_samples": 100, "max_tokens": 256, "max_rejected_share": max_rejected_share}
    return DataSpec.model_validate(asked | changes)


def checked(reader: Listed, processor: Processor, spec: DataSpec) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row as it comes out of a part."""
    folder = home() / "parts" / uuid.uuid4().hex
    for piece in reader.pieces(Cursor()):
        done: CheckedPiece = parts.check(reader, piece, processor, spec, folder)
        yield from ((piece.shard, row) for row in parts.read(done))


def taken(
    rows: Iterable[Row | Broken],
    processor: Processor,
    wanted: int = 100,
    spec: DataSpec | None = None,
    split: Split = "train",
    held_out: SeenPictures | None = None,
    has_split: bool = True,
    advance: Callable[..., None] = lambda: None,
) -> tuple[Snapshot, SeenPictures]:
    """A snapshot of rows, and its pictures."""
    reader, spec = Listed(rows, has_split), spec or a_spec()
    return take(reader, split, checked(reader, processor, spec), spec, wanted, Cursor(), held_out, advance)
