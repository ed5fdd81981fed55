"""Picture files, byte by byte: the strange, the broken and the hostile ones that no encoder would write."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from tests.data.rows import chunk

SIDE = 16
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --------------------------------------------------------------------------------------------- PNG


def png(width: int, height: int, depth: int, kind: int, rows: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of any depth and kind (0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA); ``rows`` without filters."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    length = len(rows) // height
    lines = b"".join(b"\0" + rows[length * y : length * (y + 1)] for y in range(height))
    pixels = chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


def blank_png(width: int, height: int, kind: int = 2) -> bytes:
    """A whole black PNG of any size, written without holding its pixels."""
    packer, line = zlib.compressobj(1), bytes(1 + width * {0: 1, 2: 3, 6: 4}[kind])
    pixels = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with chunks behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def with_wrong_checksum(data: bytes) -> bytes:
    """A PNG whose pixels are right and whose last IDAT has a wrong checksum."""
    last = data.index(b"IEND") - 5
    return data[:last] + bytes([data[last] ^ 1]) + data[last + 1 :]


# --------------------------------------------------------------------------------------------- JPEG


def segment(marker: int, content: bytes) -> bytes:
    """One segment of a JPEG."""
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def with_segments(data: bytes, *segments: bytes) -> bytes:
    """A JPEG with segments behind its first marker."""
    return data[:2] + b"".join(segments) + data[2:]


def as_ycck(cmyk: bytes) -> bytes:
    """A CMYK JPEG that says its planes are Y, Cb, Cr and K: Adobe's transform 2."""
    place = cmyk.index(b"Adobe") + 11
    return cmyk[:place] + b"\2" + cmyk[place + 1 :]


def without_adobe(data: bytes) -> bytes:
    place = data.index(b"\xff\xee")
    return data[:place] + data[place + 2 + int.from_bytes(data[place + 2 : place + 4], "big") :]


def of_many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG that goes over its pixels again and again."""
    data = encoded(Image.new("L", (side, side), 7), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), len(data) - 2
    return data[:end] + data[last:end] * scans + data[end:]


def exif(orientation: int, order: str = "<", more: bytes = b"", kind: int = 3) -> bytes:
    """EXIF with one entry."""
    value = struct.pack(order + {1: "BBH", 3: "HH", 4: "I"}[kind], *([orientation, 0, 0][: {1: 3, 3: 2, 4: 1}[kind]]))
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, 1)
    return head + struct.pack(order + "HHI", 0x0112, kind, 1) + value + bytes(4) + more


# --------------------------------------------------------------------------------------------- WebP, GIF, BMP


def riff(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def webp(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def three(value: int) -> bytes:
    return struct.pack("<I", value)[:3]


def webp_head(width: int, height: int, flags: int = 0x12) -> bytes:
    return riff(b"VP8X", bytes([flags, 0, 0, 0]) + three(width - 1) + three(height - 1))


def webp_frame(image: Image.Image, left: int = 0, top: int = 0, size: tuple[int, int] | None = None) -> bytes:
    """A frame of an animation; ``left`` and ``top`` are even. ``size`` is what it claims."""
    width, height = size or image.size
    place = three(left // 2) + three(top // 2) + three(width - 1) + three(height - 1)
    return riff(b"ANMF", place + three(40) + b"\0" + encoded(image, "WEBP", lossless=True)[12:])


def webp_film(width: int, height: int, *frames: bytes) -> bytes:
    return webp(webp_head(width, height), riff(b"ANIM", bytes(6)), *frames)


def gif_with(data: bytes, *blocks: bytes) -> bytes:
    """A GIF with blocks before its first picture."""
    place = data.index(b",\0\0\0\0")
    return data[:place] + b"".join(blocks) + data[place:]


def bmp_of_runs(side: int) -> bytes:
    """A run-length encoded BMP: five pixels a line, the rest is to be filled."""
    palette = b"".join(bytes([shade, shade ^ 255, shade, 0]) for shade in range(256))
    body = b"\5\5\0\0" * side + b"\0\1"
    offset = 14 + 40 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + header + palette + body
