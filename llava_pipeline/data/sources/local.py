"""Files of this machine as a source: which of them are held out, and how one that is read from front to back is cut.

Files named ``test*`` are the held-out split, where there are any; the training files are then those named ``train*``,
or all others. Where there are none, both splits read everything.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llava_pipeline.contracts import Cursor, Piece
from llava_pipeline.data.record import Row
from llava_pipeline.data.sources.reader import PIECE_ROWS, Broken, digest_of_files
from llava_pipeline.errors import NotFound, RevisionMoved, SourceUnavailable
from llava_pipeline.spec import Source, Split

MAX_DETAIL = 200
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")  # names end so
STAY_OR_GO = "put back the files as they were, or read everything again with data.increment=false"


def absolute(path: str) -> Path:
    """A path as a person writes it, made absolute; links stay links."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def named_for(split: str, stem: str) -> bool:
    """Whether a name tells that a file is of a split: ``test``, ``test-00000-of-00004``, ``test.v2``, ``test_1``."""
    return re.fullmatch(rf"{split}([-.].*|_?\d.*)?", stem) is not None


def choose(names: list[str], split: Split) -> tuple[list[str], bool]:
    """The names of a split, and whether they tell the splits apart at all."""
    held_out = [name for name in names if named_for("test", Path(name).stem)]
    if not held_out:
        return names, False
    if split == "test":
        return held_out, True
    named = [name for name in names if named_for("train", Path(name).stem)]
    return named or [name for name in names if name not in set(held_out)], True


def find_files(path: Path, split: Split, kind: str, listing: Callable[[Path], list[Path]]) -> tuple[list[Path], bool]:
    """The files of a split, in order, and whether their names tell the splits apart. A single file has no splits.

    Raises:
        NotFound: nothing is there, or no file of this kind or split.
    """
    if path.is_file():
        return [path], False
    if not path.is_dir():
        raise NotFound(f"there is no file or folder {path}; check data.source.path")
    found = [file for file in listing(path) if file.is_file() and not file.name.startswith(".")]
    if not found:
        raise NotFound(f"there is no {kind} file in {path}; check data.source.path")
    names, has_split = choose([file.name for file in found], split)
    if not names:
        raise NotFound(
            f"{path} has only files that are held out ({', '.join(file.name for file in found[:3])}) and none to train "
            "on; name those train-*, or check data.source.path"
        )
    return [file for file in found if file.name in set(names)], has_split


def image_folder(path: str | None) -> Path | None:
    """The folder that the rows' paths start from, where the spec names one.

    Raises:
        NotFound: it is not there.
    """
    if path is None:
        return None
    folder = absolute(path)
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}; check data.source.images")
    return folder


def printable(text: str) -> str:
    """The start of a text that came with a row, without what cannot be written to a file."""
    return text[:MAX_DETAIL].encode("utf-8", "backslashreplace").decode()[:MAX_DETAIL]


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read.

    Raises:
        SourceUnavailable: it cannot be opened, or the disk fails while it is read.
    """
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> SourceUnavailable:
    """What to say of a file that the system does not give."""
    found = type(error).__name__ if error.errno is None else os.strerror(error.errno)  # Arrow's says more than that
    return SourceUnavailable(f"cannot read {path} ({found}); check data.source.path, and who may read it")


def check_behind(origin: str, start: Cursor, found: str) -> None:
    """Refuse to go on where the files before a place are not those that were read.

    Raises:
        RevisionMoved: their names or sizes differ.
    """
    if start.behind != found:
        raise RevisionMoved(
            f"{origin}: the files before shard {start.shard} are not those that were read up to there "
            f"({found[:12] or 'none'}, were {start.behind[:12] or 'none'}); {STAY_OR_GO}"
        )


def refuse_shrunk(name: str, start: Cursor, num_rows: int) -> None:
    """Refuse to go on behind the end of a shard that was longer before.

    Raises:
        RevisionMoved: more rows of it were read than it has.
    """
    if start.row > num_rows:
        raise RevisionMoved(f"{name} has {num_rows} rows, of which {start.row} were read before; {STAY_OR_GO}")


class ScannedReader(ABC):
    """Files whose rows can only be found from front to back: one shard each.

    Finding the pieces reads a file once, and remembers where every ``PIECE_ROWS``th row begins; a piece is then read
    from there, by anybody.
    """

    kind: str

    def __init__(self, source: Source, path: str, split: Split) -> None:
        root = absolute(path)
        self.files, self.has_split = find_files(root, split, self.kind, self._listing)
        self.source: Source = source.model_copy(update={"path": str(root)})
        self.origin = f"{source.kind}:{root.name}/{split}"
        self._num_rows: dict[int, int] = {}

    def pieces(self, start: Cursor) -> Iterator[Piece]:
        """What there is from a place on."""
        check_behind(self.origin, start, self.behind(start.shard))
        for shard in range(start.shard, len(self.files)):
            place = start if shard == start.shard else Cursor(shard=shard)
            yield from self._pieces_of(shard, place)

    def _pieces_of(self, shard: int, place: Cursor) -> Iterator[Piece]:
        path, count, begin, offset = self.files[shard], 0, place.row, 0
        with opened(path) as file:
            for here in self.offsets(file):
                if count == begin:
                    offset = here
                count += 1
                if count > begin and count % PIECE_ROWS == 0:
                    yield Piece(shard=shard, name=path.name, start=begin, stop=count, offset=offset)
                    begin = count
        self._num_rows[shard] = count
        refuse_shrunk(path.name, place, count)
        if count > begin:
            yield Piece(shard=shard, name=path.name, start=begin, stop=count, offset=offset)

    def rows(self, piece: Piece) -> Iterator[Row | Broken]:
        """The rows of a piece."""
        path, number = self.files[piece.shard], piece.start
        with opened(path) as file:
            for row in self.read(file, piece.offset, piece.start, path):
                yield row
                number += 1
                if number == piece.stop:
                    return
        if piece.stop is not None:
            raise SourceUnavailable(
                f"{path} has lost rows while it was read: {number} are left, {piece.stop} were there; run again"
            )

    def num_rows(self) -> int:
        """Rows in all; reads through the files that have not been read through yet."""
        return sum(self._rows_of(shard) for shard in range(len(self.files)))

    def num_before(self, place: Cursor) -> int:
        """Rows before a place."""
        return sum(self._rows_of(shard) for shard in range(min(place.shard, len(self.files)))) + place.row

    def _rows_of(self, shard: int) -> int:
        if shard not in self._num_rows:
            with opened(self.files[shard]) as file:
                self._num_rows[shard] = sum(1 for _ in self.offsets(file))
        return self._num_rows[shard]

    def behind(self, shard: int) -> str:
        """Digest of the names and sizes of the files before a shard."""
        return digest_of_files(self.files[:shard])

    def id_of(self, path: Path, number: int) -> str:
        """What a row is called that has no name of its own."""
        return f"{self.origin}/{path.name}/{number}"

    def _listing(self, folder: Path) -> list[Path]:
        return sorted(folder.glob(f"*{self.kind}"))

    @abstractmethod
    def offsets(self, file: BinaryIO) -> Iterator[int]:
        """Where each row begins, in bytes, so that ``read`` finds it there."""

    @abstractmethod
    def read(self, file: BinaryIO, offset: int, number: int, path: Path) -> Iterator[Row | Broken]:
        """Rows from row ``number`` on, which begins at ``offset``, to the end of the file."""
