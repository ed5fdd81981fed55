"""What every source is to the rest: rows in the vsft schema, by pieces that any worker can read on its own.

Rows are numbered within a shard (a file, or a row group); a piece is a range of them. Reading the pieces one after
another gives every row once and in order, whoever reads which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llava_pipeline.contracts import Cursor, Piece
from llava_pipeline.data.images import MAX_BYTES
from llava_pipeline.data.record import Row
from llava_pipeline.spec import Source

PIECE_ROWS = 256


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that cannot even be read as a row: it is refused with this reason, and reading goes on behind it."""

    reason: str
    detail: str
    id: str = ""
    digest: str = ""  # sha256 of the bytes that were found, where there were any


class Reader(Protocol):
    """One split of a source, opened."""

    @property
    def source(self) -> Source:
        """The source at its resolved revision: opened again, by another process or machine, it gives the same rows."""
        ...

    @property
    def origin(self) -> str:
        """Name with the resolved revision."""
        ...

    @property
    def has_split(self) -> bool:
        """Whether the source tells training rows from held-out ones; else a share of the pictures is held out."""
        ...

    def pieces(self, start: Cursor) -> Iterator[Piece]:
        """What there is from a place on, in order.

        Raises:
            SourceUnavailable: it cannot be reached or read.
            RevisionMoved: the files behind the place are not those that were read.
        """
        ...

    def rows(self, piece: Piece) -> Iterator[Row | Broken]:
        """The rows of a piece, in order; pictures are bytes, not yet decoded.

        Raises:
            SourceUnavailable: it cannot be reached or read.
        """
        ...

    def num_rows(self) -> int | None:
        """Rows in all, or None where there is no end or nobody knows it."""
        ...

    def num_before(self, place: Cursor) -> int | None:
        """Rows before a place; None where nobody knows."""
        ...

    def behind(self, shard: int) -> str:
        """Digest of the names and sizes of the files before a shard; empty where a revision fixes them already."""
        ...


def windows(shard: int, name: str, num_rows: int, start: int = 0) -> Iterator[Piece]:
    """A shard of known length in pieces of at most ``PIECE_ROWS`` rows, at the same places wherever one starts."""
    while start < num_rows:
        stop = min(num_rows, (start // PIECE_ROWS + 1) * PIECE_ROWS)
        yield Piece(shard=shard, name=name, start=start, stop=stop)
        start = stop


def picture_below(folder: Path, name: object) -> bytes | Broken:
    """The bytes of a picture that a row names, at most one more than the image gate takes.

    Never from outside ``folder``: ``image_path_escapes``; ``image_missing`` where there is none, ``malformed`` where
    the name is no text.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        return Broken("malformed", "an image's path is not a text")
    try:
        root = folder.resolve()
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            return Broken("image_path_escapes", f"{name[:200]} leads out of the image folder")
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            return Broken("image_missing", f"{name[:200]} is not a plain file")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except UnicodeEncodeError:
        return Broken("malformed", "an image's path is not valid Unicode")
    except RuntimeError:  # of Path.resolve, up to Python 3.12
        return Broken("image_missing", f"{name[:200]}: links that lead in a circle")
    except OSError as error:
        return Broken("image_missing", f"{name[:200]}: {error.strerror or type(error).__name__}")


def digest_of_files(paths: list[Path]) -> str:
    """Digest of names and sizes, to notice files that were changed behind a place; empty for none."""
    if not paths:
        return ""
    lines = "".join(f"{path.name} {path.stat().st_size if path.exists() else 'gone'}\n" for path in paths)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def stamp_of(source: Source) -> str:
    """Digest of the names, sizes and times of all files a source reads on this machine; empty where it reads none.

    It says whether rows that were checked before are still those of the files; the snapshot does not depend on it.
    """
    digest = hashlib.sha256()
    roots = [Path(root) for name in ("path", "images") if (root := getattr(source, name, None)) is not None]
    for root in roots:
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            found = path.lstat()
            digest.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest() if roots else ""
