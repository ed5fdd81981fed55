"""From an image file to the one still picture in it: first frame, nothing beside it.

Pillow reads everything that a file holds: profiles, texts, comments, EXIF, the list of frames. Hostile or broken side
information costs it seconds and hundreds of megabytes (18 MB of GIF comments: 700 MB), or ends in warnings; none of
it is in the picture. So a file is taken apart here, by lengths alone, and only what the picture needs is put together
again, as a file of the same format. Of EXIF one number is read, the orientation.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

MAX_SEGMENTS = 4096  # of a JPEG's head: 20 MB of the largest segments are 320
MAX_CHUNKS = 100_000  # of a PNG or WebP: a million empty ones cost seconds
MAX_SCANS = 64  # of a JPEG: encoders write ten; each costs a pass over all pixels, and a hostile one is four bytes
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
_OTHERS = (
    (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"%PDF", "PDF"), (b"8BPS", "PSD"), (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x0cjP", "JPEG 2000"), (b"\0\0\0\x0cJXL", "JPEG XL"), (b"\xff\x0a", "JPEG XL"), (b"%!PS", "EPS"),
)  # fmt: skip


class NoStill(Exception):
    """There is no whole picture in the file; the message says why."""


@dataclass(frozen=True, slots=True)
class Still:
    """A file of one picture in one of ``FORMATS``, free of side information.

    ``orientation`` is EXIF's, 1 to 8. ``canvas`` (width, height) and ``corner`` (left, top) say where the picture
    stands, where it may be smaller than what is shown; never does it reach out. None: it is what is shown.
    """

    format: str
    data: bytes
    orientation: int = 1
    canvas: tuple[int, int] | None = None
    corner: tuple[int, int] = (0, 0)


def first_still(data: bytes) -> Still:
    """The still picture of a JPEG, PNG, WebP, GIF or BMP file; its pixels are not looked at.

    Raises:
        NoStill: another format, or one that ends or breaks before the picture does.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
        if data.startswith((b"GIF87a", b"GIF89a")):
            return _gif(data)
        if data.startswith(b"BM"):
            return _bmp(data)
    except (struct.error, IndexError) as error:
        raise NoStill("cut short") from error
    raise NoStill(f"{_kind(data)}, not one of {', '.join(FORMATS)}")


def _kind(data: bytes) -> str:
    """What bytes of no accepted format seem to be."""
    if not data:
        return "no bytes"
    if data[4:8] == b"ftyp":
        return f"{data[8:12].decode('ascii', 'replace')!r} (AVIF, HEIC or a video)"
    if data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "text (HTML, SVG or XML)"
    return next((name for start, name in _OTHERS if data.startswith(start)), "an unknown format")


# --------------------------------------------------------------------------------------------- JPEG


def _jpeg(data: bytes) -> Still:
    """Its tables and scans; of the application segments only those that tell the colour space (JFIF, Adobe).

    The pictures behind the first one (MPO) and a film behind a photograph are never reached by a decoder.
    """
    kept, orientation, place = [data[:2]], None, 2
    for _ in range(MAX_SEGMENTS):
        marker, place = _next_marker(data, place)
        if 0xD0 <= marker <= 0xD8 or marker == 0x01:  # stands alone
            place += 2
            continue
        if marker == 0xD9:
            raise NoStill("ends before its first scan")
        if marker == 0xDA:
            _check_scans(data, place)
            return Still("JPEG", b"".join([*kept, data[place:]]), orientation or 1)
        end = place + 2 + _length(data, place)
        payload = data[place + 4 : place + 20]
        if marker == 0xE1 and payload.startswith(b"Exif\0"):
            orientation = orientation or _orientation(data[place + 10 : end])
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE) or payload.startswith((b"JFIF", b"Adobe")):
            kept.append(data[place:end])
        place = end
    raise NoStill(f"more than {MAX_SEGMENTS} segments")


def _next_marker(data: bytes, place: int) -> tuple[int, int]:
    found = _MARKER.search(data, place)
    if found is None:
        raise NoStill("cut short")
    return found[1][0], found.start()


def _length(data: bytes, place: int) -> int:
    (length,) = struct.unpack_from(">H", data, place + 2)
    if length < 2 or place + 2 + length > len(data):
        raise NoStill("cut short")
    return int(length)


def _check_scans(data: bytes, place: int) -> None:
    """Refuse a picture of more scans than any encoder writes: 325 KB of them take 47 seconds."""
    if data.count(b"\xff\xda", place) <= MAX_SCANS:
        return
    scans = 0  # the two bytes may also stand in a film behind the picture: follow the markers to the picture's end
    while (found := _MARKER.search(data, place)) is not None and found[1] != b"\xd9":
        marker, place = found[1][0], found.start()
        scans += marker == 0xDA
        if scans > MAX_SCANS:
            raise NoStill(f"more than {MAX_SCANS} scans")
        place += 2 if 0xD0 <= marker <= 0xD8 or marker == 0x01 else 2 + _length(data, place)


# --------------------------------------------------------------------------------------------- PNG


def _png(data: bytes) -> Still:
    """Header, palette, transparency and pixels, their checksums right; an animation's default picture."""
    depth, kind = data[24], data[25]
    kept, orientation, place = [data[:8]], None, 8
    for _ in range(MAX_CHUNKS):
        if place + 8 > len(data):
            break
        (length,) = struct.unpack_from(">I", data, place)
        name, end = data[place + 4 : place + 8], place + 12 + length
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            (checksum,) = struct.unpack_from(">I", data, end - 4)
            if zlib.crc32(memoryview(data)[place + 4 : end - 4]) != checksum:
                raise NoStill(f"a wrong checksum in {name.decode()}")
            kept.append(data[place:end] if name != b"tRNS" else _in_8_bits(data[place + 8 : end - 4], depth, kind))
        elif name == b"eXIf":
            orientation = orientation or _orientation(data[place + 8 : end - 4])
        if name == b"IEND":
            break
        place = end
    else:
        raise NoStill(f"more than {MAX_CHUNKS} chunks")
    return Still("PNG", b"".join(kept), orientation or 1)


def _in_8_bits(transparent: bytes, depth: int, kind: int) -> bytes:
    """The chunk tRNS as Pillow's pixels have it: it scales pixels of other depths to 8 bits, but not this colour.

    Of 16-bit RGB it keeps the upper halves: what differs from the transparent colour by less is transparent too.
    """
    values = struct.unpack(f">{len(transparent) // 2}H", transparent[: len(transparent) // 2 * 2])
    if kind == 0 and depth in (2, 4):
        transparent = struct.pack(f">{len(values)}H", *(value * 255 // (2**depth - 1) & 0xFFFF for value in values))
    if kind == 2 and depth == 16:
        transparent = struct.pack(f">{len(values)}H", *(value >> 8 for value in values))
    content = b"tRNS" + transparent
    return struct.pack(">I", len(transparent)) + content + struct.pack(">I", zlib.crc32(content))


# --------------------------------------------------------------------------------------------- WebP


def _webp(data: bytes) -> Still:
    """The picture, or the first frame of an animation, as a file of its own: Pillow keeps two whole canvases else."""
    (length,) = struct.unpack_from("<I", data, 4)
    if 8 + length > len(data):
        raise NoStill("cut short")
    canvas: tuple[int, int] | None = None
    frame: Still | None = None
    alpha, orientation = b"", None
    for name, start, end in _chunks(data, 12, 8 + length):
        if name == b"VP8X":
            canvas = (1 + _three(data, start + 4), 1 + _three(data, start + 7))
        elif name == b"EXIF":
            orientation = orientation or _orientation(data[start:end].removeprefix(b"Exif\0\0"))
        elif frame is None and name == b"ALPH":
            alpha = data[start:end]
        elif frame is None and name in (b"VP8 ", b"VP8L"):
            frame = _webp_frame(name, data[start:end], alpha)
            if canvas not in (None, frame.canvas):
                raise NoStill("a picture of another size than its canvas")
        elif frame is None and name == b"ANMF":
            frame = _animated(data, start, end)
    if frame is None:
        raise NoStill("no picture in it")
    return Still("WEBP", frame.data, orientation or 1, _holding(canvas, frame), frame.corner)


def _holding(canvas: tuple[int, int] | None, frame: Still) -> tuple[int, int]:
    assert frame.canvas is not None
    (left, top), (width, height) = frame.corner, frame.canvas
    whole = canvas or frame.canvas
    if left + width > whole[0] or top + height > whole[1]:
        raise NoStill("a frame that reaches out of its canvas")
    return whole


def _animated(data: bytes, start: int, end: int) -> Still:
    """The frame of a chunk ANMF."""
    corner = (2 * _three(data, start), 2 * _three(data, start + 3))
    size = (1 + _three(data, start + 6), 1 + _three(data, start + 9))
    alpha = b""
    for name, first, last in _chunks(data, start + 16, end):
        if name == b"ALPH":
            alpha = data[first:last]
        if name in (b"VP8 ", b"VP8L"):
            frame = _webp_frame(name, data[first:last], alpha)
            if frame.canvas != size:
                raise NoStill("a picture of another size than its frame")
            return Still("WEBP", frame.data, 1, size, corner)
    raise NoStill("no picture in its first frame")


def _webp_frame(name: bytes, picture: bytes, alpha: bytes) -> Still:
    """A file of one picture; its size from the bit stream, which is what a decoder believes."""
    if name == b"VP8 ":
        if picture[3:6] != b"\x9d\x01\x2a":
            raise NoStill("no key frame")
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", picture, 6))
    else:
        if picture[0] != 0x2F:
            raise NoStill("no lossless picture")
        (bits,) = struct.unpack_from("<I", picture, 1)
        width, height, alpha = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), b""
    body = _chunk(name, picture)
    if alpha:
        extended = b"\x10\0\0\0" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
        body = _chunk(b"VP8X", extended) + _chunk(b"ALPH", alpha) + body
    return Still("WEBP", b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body, 1, (width, height))


def _chunks(data: bytes, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of each chunk."""
    for _ in range(MAX_CHUNKS):
        if place + 8 > end:
            return
        (length,) = struct.unpack_from("<I", data, place + 4)
        if place + 8 + length > end:
            raise NoStill("cut short")
        yield data[place : place + 4], place + 8, place + 8 + length
        place += 8 + length + length % 2
    raise NoStill(f"more than {MAX_CHUNKS} chunks")


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _three(data: bytes, place: int) -> int:
    if place + 3 > len(data):
        raise NoStill("cut short")
    return int.from_bytes(data[place : place + 3], "little")


# --------------------------------------------------------------------------------------------- GIF, BMP


def _gif(data: bytes) -> Still:
    """The first frame on a screen of its own size, with the last graphic control block before it."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    head = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    place, control = head, b""
    while data[place] != 0x2C:
        if data[place] == 0x3B:
            raise NoStill("no picture in it")
        if data[place] != 0x21:  # not a block: Pillow and browsers look for the next one
            place += 1
            continue
        if data[place + 1] == 0xF9 and data[place + 2] == 4:
            control = data[place : place + 7] + b"\0"
        place += 2
        while data[place]:
            place += 1 + data[place]
        place += 1
    left, top, wide, high = struct.unpack_from("<HHHH", data, place + 1)
    screen = struct.pack("<HH", wide, high)
    file = data[:6] + screen + data[10:head] + control + b",\0\0\0\0" + screen + data[place + 9 :]
    return Still("GIF", file, 1, (max(width, left + wide), max(height, top + high)), (left, top))


def _bmp(data: bytes) -> Still:
    """As it is, unless it is run-length encoded: Pillow decodes that in Python, 26 KB of it in six seconds."""
    (header,) = struct.unpack_from("<I", data, 14)
    if header >= 40 and struct.unpack_from("<I", data, 30)[0] in (1, 2):
        raise NoStill("run-length encoded")
    return Still("BMP", data)


# --------------------------------------------------------------------------------------------- EXIF


def _orientation(exif: bytes) -> int | None:
    """The orientation that a TIFF header's first directory tells; None where it tells none from 1 to 8."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == 0x0112 and kind in (1, 3, 4):
                (value,) = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], exif, entry + 8)
                return int(value) if 1 <= value <= 8 else None
    except struct.error:
        pass
    return None
