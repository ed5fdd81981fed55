"""WebDataset: tar shards in which neighbouring files that share a name up to the first dot are one sample.

Nothing is ever extracted: a member is a name and a range of bytes of its shard. Links, devices and names that lead
out of the archive are refused with their sample.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from llava_pipeline.data.images import MAX_BYTES
from llava_pipeline.data.record import Malformed, Row
from llava_pipeline.data.sources.conversation import (
    MAX_JSON_BYTES,
    MAX_PICTURES,
    asked_and_told,
    id_of,
    parse,
    row_of_object,
)
from llava_pipeline.data.sources.local import PICTURES, ScannedReader, printable
from llava_pipeline.data.sources.reader import Broken
from llava_pipeline.spec import Split, WebDatasetSource

CAPTIONS = ("txt", "caption")
MAX_CAPTION_BYTES = 1 << 20
MAX_NAME_BYTES = 1 << 16  # of a long name, or of the extended attributes of one member
BLOCK = tarfile.BLOCKSIZE
EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a shard."""

    name: str
    offset: int  # of its header, or of the first header that belongs to it
    data: int  # where its bytes begin
    size: int
    oddity: str = ""  # why it is not read


@dataclass(slots=True)
class Sample:
    """Members of one name by what follows its first dot; or why the rest of a shard cannot be read."""

    key: str
    offset: int
    members: list[tuple[str, Member]] = field(default_factory=list)
    damage: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether there is a picture and something to say about it."""
        found = {extension for extension, _ in self.members}
        return not found.isdisjoint(PICTURES) and not found.isdisjoint(("json", *CAPTIONS))


class Damaged(Exception):
    """A shard that cannot be read on from a place; ``name`` is the member that was cut, where it is known."""

    def __init__(self, offset: int, detail: str, name: str = "") -> None:
        super().__init__(detail)
        self.offset, self.detail, self.name = offset, detail, name


class WebDatasetReader(ScannedReader):
    """A shard, or a folder of them."""

    kind = ".tar"

    def __init__(self, source: WebDatasetSource, split: Split) -> None:
        super().__init__(source, source.path, split)
        self.question = source.question

    def offsets(self, file: BinaryIO) -> Iterator[int]:
        """Where each sample's first header begins."""
        return (sample.offset for sample in samples(file))

    def read(self, file: BinaryIO, offset: int, number: int, path: Path) -> Iterator[Row | Broken]:
        """Rows from a sample on."""
        for sample in samples(file, offset):
            row_id = f"{self.origin}/{path.name}/{sample.key}"
            if sample.damage:
                yield Broken("shard_unreadable", f"{path.name}: {sample.damage}", printable(row_id))
                continue
            content = _Content(file, sample)
            try:
                row = content.row(row_id, self.question)
            except Malformed as error:
                row = Broken("malformed", str(error))
            if isinstance(row, Broken):
                row = Broken(row.reason, printable(row.detail), printable(row_id), content.digest())
            yield row


class _Content:
    """What the members of a sample hold."""

    def __init__(self, file: BinaryIO, sample: Sample) -> None:
        self.file, self.sample = file, sample
        self.hash = hashlib.sha256()
        self.has_read = False

    def row(self, row_id: str, question: str) -> Row | Broken:
        """The sample as a row.

        Raises:
            Malformed: it is none.
        """
        by_extension: dict[str, Member] = {}
        pictures: list[Member] = []
        for extension, member in self.sample.members:
            if member.oddity:
                raise Malformed(f"{member.name}: {member.oddity}")
            if extension in PICTURES:
                pictures.append(member)
            elif by_extension.setdefault(extension, member) is not member:
                raise Malformed(f"two files {extension}")
        if not pictures:
            raise Malformed(f"no picture; there is {', '.join(by_extension)}")
        if len(pictures) > MAX_PICTURES:
            return Broken("not_one_image", f"{len(pictures)} images")
        return self._row(row_id, question, pictures, by_extension)

    def _row(self, row_id: str, question: str, pictures: list[Member], others: dict[str, Member]) -> Row | Broken:
        caption = next((others[name] for name in CAPTIONS if name in others), None)
        value = parse(self._text(others["json"], MAX_JSON_BYTES)) if "json" in others else {}
        # img2dataset puts what it knows of a picture into the .json, and its caption into the .txt as well.
        if value.get("messages") is not None or value.get("conversations") is not None or caption is None:
            if "json" not in others:
                raise Malformed("no .json, .txt or .caption beside the picture")
            value = {name: own for name, own in value.items() if name not in ("image", "images")}
            row = row_of_object(value, id_of(value, row_id), lambda _: [])
            if isinstance(row, Broken):
                return row
        else:
            try:
                told = self._text(caption, MAX_CAPTION_BYTES).decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise Malformed(f"{caption.name} is not UTF-8 at byte {error.start}") from error
            if not told:
                return Broken("caption_missing", f"{caption.name} is empty")
            row = {"id": id_of(value, row_id), "messages": asked_and_told(question, told)}
        return {**row, "images": [{"bytes": self._bytes(member, MAX_BYTES + 1)} for member in pictures]}

    def _text(self, member: Member, most: int) -> bytes:
        if member.size > most:
            raise Malformed(f"{member.name} has {member.size} bytes, at most {most}")
        return self._bytes(member, most)

    def _bytes(self, member: Member, most: int) -> bytes:
        self.file.seek(member.data)
        data = self.file.read(min(member.size, most))
        self.hash.update(data)
        self.has_read = True
        return data

    def digest(self) -> str:
        """Digest of what was read; empty where nothing was."""
        return self.hash.hexdigest() if self.has_read else ""


def samples(file: BinaryIO, offset: int = 0) -> Iterator[Sample]:
    """The samples of a shard from a place on; where it is damaged, the rest of it is one more.

    A sample that the damage has cut is part of that rest.
    """
    sample: Sample | None = None
    try:
        for member in members(file, offset):
            key, extension = key_and_extension(member.name)
            if not key:
                continue
            if sample is not None and key != sample.key:
                yield sample
                sample = None
            sample = sample or Sample(key, member.offset)
            sample.members.append((extension, member))
    except Damaged as damage:
        if sample is not None and (key_and_extension(damage.name)[0] == sample.key or not sample.is_whole):
            yield Sample(sample.key, sample.offset, damage=damage.detail)
            return
        if sample is not None:
            yield sample
        yield Sample("", damage.offset, damage=damage.detail)
        return
    if sample is not None:
        yield sample


def key_and_extension(name: str) -> tuple[str, str]:
    """What a member has in common with the rest of its sample, and what it is; empty for what is of no sample."""
    match = _SAMPLE.fullmatch(name)
    if match is None or match[1].rpartition("/")[2].startswith("__"):
        return "", ""
    return match[1], match[2].lower()


def members(file: BinaryIO, offset: int = 0) -> Iterator[Member]:
    """The files of a shard from a place on. Empty blocks are passed over: shards may be joined with ``cat``.

    Raises:
        Damaged: what stands there is no header, or the file ends too early.
    """
    length = file.seek(0, 2)
    begin, long_name, attributes, has_end = offset, "", dict[str, str](), False
    while True:
        file.seek(offset)
        block = file.read(BLOCK)
        if len(block) < BLOCK and has_end and not any(block):
            return
        if len(block) < BLOCK:
            raise Damaged(begin, f"it breaks off at byte {offset + len(block)}, without the end of an archive")
        has_end = not any(block)
        if has_end:
            offset += BLOCK
            begin = offset
            continue
        header = _header(block, begin, offset)
        is_extended = header.type in EXTENDED
        name = "" if is_extended else attributes.get("path") or long_name or header.name
        size = header.size if is_extended else int(attributes.get("size", header.size))
        if header.issym() or header.islnk() or header.isdir() or header.isdev():
            size = 0  # nothing follows, whatever their header says
        data, offset = offset + BLOCK, offset + BLOCK + -(-size // BLOCK) * BLOCK
        if data + size > length:
            raise Damaged(begin, f"it breaks off at byte {length}, within {printable(header.name)}", name)
        if is_extended:
            content = file.read(min(size, MAX_NAME_BYTES))
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "backslashreplace")
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                attributes = _attributes(content)
            continue
        if not header.isdir():
            yield Member(name, begin, data, size, _oddity(header, name))
        begin, long_name, attributes = offset, "", {}


def _header(block: bytes, begin: int, offset: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except (tarfile.TarError, ValueError) as error:
        raise Damaged(begin, f"no header of an archive at byte {offset}") from error
    if header.size < 0:
        raise Damaged(begin, f"a size of {header.size} bytes at byte {offset}")
    return header


def _attributes(content: bytes) -> dict[str, str]:
    """The name and the size in a member's extended attributes; lines as ``21 path=000001.jpg``, with their length."""
    found = {}
    while match := re.match(rb"(\d{1,8}) ([^=]+)=", content):
        length = int(match[1])
        key, value = match[2], content[match.end() : length - 1].decode("utf-8", "backslashreplace")
        if length <= match.end():
            break
        if key == b"path" or (key == b"size" and re.fullmatch(r"\d{1,18}", value)):
            found[key.decode()] = value
        content = content[length:]
    return found


def _oddity(header: tarfile.TarInfo, name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        return "its name leads out of the archive"
    if header.issym() or header.islnk():
        return "a link is not followed"
    return "" if header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) else "not a plain file"
