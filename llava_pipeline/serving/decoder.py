"""The process in which pictures are decoded, so that a hostile file costs at most this process.

``python -m llava_pipeline.serving.decoder SETTINGS``: started by ``pictures``, never by a person. It imports neither
torch nor transformers, may take so much memory and no more, can write no file, and dies with the server.

    frame    one letter, length (8 bytes, big endian), payload
    to us    D  bytes of a file    B  the same in base64
    from us  R  ready           P  pixels (S, S, 3)           N  {"reason": ..., "detail": ...}
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from dataclasses import asdict, dataclass
from typing import BinaryIO

from llava_pipeline.data.images import ImageRefused, decode
from llava_pipeline.model.processor import ImageSettings
from llava_pipeline.serving.image_urls import PictureRejected, from_base64

HEAD = struct.Struct(">cQ")
READY, DATA, BASE64, PIXELS, NOTHING = b"R", b"D", b"B", b"P", b"N"
MEMORY, NO_BASE64 = "image_too_much_memory", "invalid_base64"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server tells its decoder: the tower's settings, bytes of memory beyond the imports, and who it is."""

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    memory_bytes: int
    parent: int

    def written(self) -> str:
        """One argument of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, written: str) -> Settings:
        """What ``written`` wrote; JSON knows lists alone."""
        values = json.loads(written)
        return cls(**values | {"mean": tuple(values["mean"]), "std": tuple(values["std"])})

    @property
    def images(self) -> ImageSettings:
        """The tower's part of it."""
        return ImageSettings(self.side, self.mean, self.std)


def die_with(parent: int) -> None:
    """Be killed when the parent dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def limit(memory_bytes: int) -> None:
    """So much address space beyond what is in use now; no core dumps, no files."""
    with open("/proc/self/statm", "rb") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, in_use + memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def answer(kind: bytes, data: bytes, images: ImageSettings) -> tuple[bytes, bytes]:
    """A file's pixels exactly as training sees them, or why there are none."""
    try:
        data = from_base64(data.decode("utf-8", "surrogatepass")) if kind == BASE64 else data
        return PIXELS, images.resize(decode(data)).tobytes()
    except ImageRefused as error:
        if not isinstance(error.__cause__, MemoryError):
            return _nothing(error.reason, error.detail)
    except PictureRejected as error:
        return _nothing(NO_BASE64, error.message)
    except MemoryError:
        pass
    return _nothing(MEMORY, "")


def _nothing(reason: str, detail: str) -> tuple[bytes, bytes]:
    return NOTHING, json.dumps({"reason": reason, "detail": detail}).encode()


def main() -> None:
    """Answer one picture after the other until the server closes the pipe."""
    settings = Settings.read(sys.argv[1])
    die_with(settings.parent)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for a frame
    images = settings.images
    answer(DATA, _smallest_picture(), images)  # whatever is imported on first use
    limit(settings.memory_bytes)
    _write(sink, READY, b"")
    while (head := source.read(HEAD.size)) and len(head) == HEAD.size:
        kind, length = HEAD.unpack(head)
        data = source.read(length)
        if len(data) < length:
            return
        _write(sink, *answer(kind, data, images))


def _smallest_picture() -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 54 + 192, 0, 54, 40, 8, 8, 1, 24, 0, 192, 0, 0, 0, 0) + bytes(192)


def _write(sink: BinaryIO, kind: bytes, payload: bytes) -> None:
    sink.write(HEAD.pack(kind, len(payload)) + payload)
    sink.flush()


if __name__ == "__main__":
    main()
