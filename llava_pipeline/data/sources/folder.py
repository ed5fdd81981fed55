"""A folder of pictures with captions beside them: ``cat.png`` and ``cat.txt``, of which the first line counts.

In the package ``tuxpaint-stamps-default`` the lines behind the first are translations.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from llava_pipeline.contracts import Cursor, Piece
from llava_pipeline.data.images import MAX_BYTES
from llava_pipeline.data.record import Row
from llava_pipeline.data.sources.conversation import asked_and_told
from llava_pipeline.data.sources.local import PICTURES, absolute, check_behind, choose, printable, refuse_shrunk
from llava_pipeline.data.sources.reader import PIECE_ROWS, Broken, digest_of_files, picture_below, windows
from llava_pipeline.errors import NotFound
from llava_pipeline.spec import FolderSource, Source, Split

SUFFIXES = tuple(f".{ending}" for ending in PICTURES)


class FolderReader:
    """Every picture below a folder, in the order of their paths; ``PIECE_ROWS`` of them are a shard.

    Folders ``train`` and ``test`` directly in it tell the splits apart. Folders that are links are not entered.
    """

    def __init__(self, source: FolderSource, split: Split) -> None:
        self.root = absolute(source.path)
        if not self.root.is_dir():
            raise NotFound(f"there is no folder {self.root}; check data.source.path")
        self.source: Source = source.model_copy(update={"path": str(self.root)})
        self.origin = f"{source.kind}:{self.root.name}/{split}"
        self.question = source.question
        found = sorted(pictures_in(self.root))
        if not found:
            raise NotFound(f"there is no picture ({' '.join(SUFFIXES)}) below {self.root}; check data.source.path")
        tops = sorted({PurePosixPath(path).parts[0] for path in found if "/" in path})
        chosen, self.has_split = choose(tops, split)
        self.paths = [path for path in found if path.split("/")[0] in set(chosen)] if self.has_split else found
        if not self.paths:
            raise NotFound(f"{self.root} has no picture but in folders that are held out; check data.source.path")

    def pieces(self, start: Cursor) -> Iterator[Piece]:
        """What there is from a place on."""
        check_behind(self.origin, start, self.behind(start.shard))
        for first in range(start.shard * PIECE_ROWS, len(self.paths), PIECE_ROWS):
            shard, num_rows = first // PIECE_ROWS, min(PIECE_ROWS, len(self.paths) - first)
            row = start.row if shard == start.shard else 0
            refuse_shrunk(self.origin, Cursor(shard=shard, row=row), num_rows)
            yield from windows(shard, f"{self.root.name}, from {printable(self.paths[first])}", num_rows, row)

    def rows(self, piece: Piece) -> Iterator[Row | Broken]:
        """The rows of a piece."""
        first = piece.shard * PIECE_ROWS
        for path in self.paths[first + piece.start : None if piece.stop is None else first + piece.stop]:
            yield self._row(path)

    def _row(self, path: str) -> Row | Broken:
        row_id = printable_id(f"{self.origin}/{path}")
        caption = self._caption(path)
        found = caption if isinstance(caption, Broken) else picture_below(self.root, path)
        if isinstance(found, Broken):
            return Broken(found.reason, printable(found.detail), printable(row_id), found.digest)
        return {
            "id": row_id, "messages": asked_and_told(self.question, str(caption)), "images": [{"bytes": found}],
        }  # fmt: skip

    def _caption(self, path: str) -> str | Broken:
        """The first line of the text beside a picture."""
        name = f"{path.rpartition('.')[0]}.txt"
        found = picture_below(self.root, name)  # a text is found, and refused, as a picture is
        if isinstance(found, Broken):
            return Broken("caption_missing", found.detail) if found.reason == "image_missing" else found
        digest = hashlib.sha256(found).hexdigest()
        if len(found) > MAX_BYTES:
            return Broken("malformed", f"{name} has more than {MAX_BYTES} bytes", digest=digest)
        try:
            text = found.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Broken("malformed", f"{name} is not UTF-8 at byte {error.start}", digest=digest)
        line = re.split(r"[\r\n]", text.strip(), maxsplit=1)[0].strip()
        return line or Broken("caption_missing", f"{name} is empty", digest=digest)

    def num_rows(self) -> int:
        """Pictures in all."""
        return len(self.paths)

    def num_before(self, place: Cursor) -> int:
        """Pictures before a place."""
        return min(len(self.paths), place.shard * PIECE_ROWS) + place.row

    def behind(self, shard: int) -> str:
        """Digest of the names and sizes of the pictures before a shard."""
        return digest_of_files([self.root / path for path in self.paths[: shard * PIECE_ROWS]])


def pictures_in(root: Path) -> Iterator[str]:
    """Paths of the pictures below a folder, relative to it. What begins with a dot is left out."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        relative = Path(folder).relative_to(root)
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield (relative / name).as_posix()


def printable_id(text: str) -> str:
    """A name as an id: one that is not UTF-8 on disk is written with escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
