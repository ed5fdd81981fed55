"""The scenes, drawn as they are read. One shard without an end."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

from llava_pipeline.contracts import Cursor, Piece
from llava_pipeline.data import scenes
from llava_pipeline.data.record import Row
from llava_pipeline.data.sources.reader import PIECE_ROWS
from llava_pipeline.spec import ScenesSource, Split


class ScenesReader:
    """Rows of one split, each a pure function of its number; pictures as PNG."""

    has_split = True

    def __init__(self, source: ScenesSource, split: Split) -> None:
        self.source, self.split = source, split
        self.mix = scenes.Mix(source.single_shapes, source.yes_no_pairs)
        self.origin = scenes.name_of(source.seed, split, self.mix)

    def pieces(self, start: Cursor) -> Iterator[Piece]:
        """From a place on, without end."""
        for first in itertools.count(start.row // PIECE_ROWS * PIECE_ROWS, PIECE_ROWS):
            yield Piece(shard=0, name=self.origin, start=max(first, start.row), stop=first + PIECE_ROWS)

    def rows(self, piece: Piece) -> Iterator[Row]:
        """The scenes of a piece."""
        endless = scenes.records(self.source.seed, self.split, piece.start, self.mix)
        for row in itertools.islice(endless, piece.num_rows):
            buffer = io.BytesIO()
            row["images"][0].save(buffer, "PNG", compress_level=1)
            yield {**row, "images": [{"bytes": buffer.getvalue()}]}

    def num_rows(self) -> None:
        """There is no end."""

    def num_before(self, place: Cursor) -> int:
        """Rows before a place."""
        return place.row

    def behind(self, shard: int) -> str:
        """The seed fixes everything."""
        return ""
