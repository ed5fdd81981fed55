"""From the ``url`` of an image part to the pixels that the vision tower sees.

The image gate and the resizing are training's own, in processes of their own (``decoder``): one picture at a time per
process, bounded in memory and time. A process that dies or is too slow costs the picture it worked on, and is
replaced; pictures that wait are not touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_pipeline.data.images import MAX_BYTES
from llava_pipeline.model.processor import ImageSettings
from llava_pipeline.serving.decoder import BASE64, DATA, HEAD, MEMORY, NO_BASE64, PIXELS, READY, Settings
from llava_pipeline.serving.image_urls import PictureRejected as PictureRejected
from llava_pipeline.serving.image_urls import base64_of, is_data_uri, too_large, unsupported
from llava_pipeline.serving.remote import Remote

log = logging.getLogger(__name__)
MEMORY_BYTES = 1 << 30  # the largest picture that is allowed takes 0.7 GB while it is decoded
START_SECONDS = 60.0  # a busy machine imports slowly
WAITS = 3  # a picture waits for a process at most so many times the seconds that one picture may take
MOST_BYTES = 1 << 16  # of an answer that is not pixels
KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR")
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Picture:
    """Pixels (S, S, 3) uint8 as ``Processor.resize`` has them, read-only; ``digest`` is of these and their shape."""

    digest: str
    pixels: Pixels


def picture_of(pixels: Pixels) -> Picture:
    """A picture of pixels as the tower sees them."""
    seen = np.ascontiguousarray(pixels, dtype=np.uint8).view()
    seen.flags.writeable = False
    digest = hashlib.sha256(repr(seen.shape).encode())
    digest.update(seen.data)
    return Picture(digest.hexdigest(), seen)


class Pictures:
    """Decodes pictures in ``workers`` processes, each within ``seconds`` and ``memory_bytes``.

    Data URIs alone, unless ``allowed_hosts`` names hosts (``name`` or ``name:port``) to fetch from. ``max_bytes`` is
    the most a picture's file may have. ``remote`` is for tests.
    """

    def __init__(
        self,
        images: ImageSettings,
        *,
        allowed_hosts: frozenset[str] = frozenset(),
        workers: int = 1,
        seconds: float = 10.0,
        memory_bytes: int = MEMORY_BYTES,
        max_bytes: int = MAX_BYTES,
        remote: Remote | None = None,
    ) -> None:
        self._side, self._seconds, self._max_bytes = images.side, seconds, min(max_bytes, MAX_BYTES)
        self._settings = Settings(images.side, images.mean, images.std, memory_bytes, os.getpid())
        if remote is None and allowed_hosts:
            remote = Remote(allowed_hosts, seconds=seconds, max_bytes=self._max_bytes)
        self._remote = remote
        self._free: asyncio.LifoQueue[_Decoder | None] = asyncio.LifoQueue()  # the one used last is still in the cache
        self._workers, self._running, self._closed = workers, set[_Decoder](), False
        for _ in range(workers):
            self._free.put_nowait(None)

    async def start(self) -> None:
        """Start the processes now, so that the first picture need not wait for one.

        Raises:
            PictureRejected: ``decoder_unavailable``, one does not start.
        """
        taken = [await self._free.get() for _ in range(self._workers)]
        started = await asyncio.gather(*(self._alive(decoder) for decoder in taken), return_exceptions=True)
        for decoder in started:
            self._free.put_nowait(None if isinstance(decoder, BaseException) else decoder)
        for decoder in started:
            if isinstance(decoder, BaseException):
                raise decoder

    async def load(self, url: str) -> Picture:
        """The picture of a data URI, or at an address that is allowed.

        Raises:
            PictureRejected: it cannot be had or is not accepted, or (503) the process that decoded it died.
        """
        kind, data = await self._file(url)
        pixels = np.frombuffer(await self._decoded(kind, data), np.uint8).reshape(self._side, self._side, 3)
        return picture_of(pixels)

    async def close(self) -> None:
        """End the processes; pictures under way are refused with 503."""
        self._closed = True
        await asyncio.gather(*(self._end(decoder) for decoder in tuple(self._running)))

    async def _file(self, url: str) -> tuple[bytes, bytes]:
        if is_data_uri(url):
            return BASE64, base64_of(url, self._max_bytes).encode("utf-8", "surrogatepass")
        if self._remote is None:
            raise unsupported()
        return DATA, await self._remote.fetch(url)

    async def _decoded(self, kind: bytes, data: bytes) -> bytes:
        try:
            async with asyncio.timeout(WAITS * self._seconds):
                decoder = await self._free.get()
        except TimeoutError:
            raise _unavailable("too many images are waiting to be decoded") from None
        try:
            decoder = await self._alive(decoder)
            return await self._ask(decoder, kind, data)
        finally:
            self._free.put_nowait(decoder)  # whether it is alive is looked at when it is taken

    async def _alive(self, decoder: _Decoder | None) -> _Decoder:
        self._check_open()
        if decoder is not None and decoder.alive:
            return decoder
        if decoder is not None:
            await self._end(decoder)
        try:
            decoder = await _Decoder.start(self._settings)
        except (OSError, EOFError, TimeoutError) as error:
            log.error("no process to decode images: %r", error)
            raise _unavailable("the image decoder does not start") from None
        self._running.add(decoder)
        try:
            self._check_open()
        except PictureRejected:
            await self._end(decoder)
            raise
        return decoder

    def _check_open(self) -> None:
        if self._closed:
            raise _unavailable("the server is closing")

    async def _ask(self, decoder: _Decoder, kind: bytes, data: bytes) -> bytes:
        answered = False
        try:
            async with asyncio.timeout(self._seconds):
                kind, payload = await decoder.ask(kind, data)
            answered = True
        except TimeoutError:
            message = f"The image takes more than {self._seconds:g} seconds to decode."
            raise PictureRejected(400, "image_too_slow", message) from None
        except (OSError, EOFError):
            raise _unavailable("the process that decoded the image died") from None
        finally:
            if not answered:  # also when nobody waits for it any more
                decoder.kill()
                await asyncio.shield(self._end(decoder))
        if kind == PIXELS:
            return payload
        refusal = json.loads(payload)
        raise self._refused(refusal["reason"], refusal["detail"])

    async def _end(self, decoder: _Decoder) -> None:
        await decoder.end()
        self._running.discard(decoder)

    def _refused(self, reason: str, detail: str) -> PictureRejected:
        if reason == MEMORY:
            return PictureRejected(413, "image_too_large", "The image takes too much memory to decode.")
        if reason == NO_BASE64:
            return PictureRejected(400, NO_BASE64, detail)
        if reason == "image_too_many_bytes":
            return too_large(self._max_bytes)
        if reason == "image_too_many_pixels":
            return PictureRejected(413, "image_too_large", f"The image is too large ({detail}).")
        return PictureRejected(400, "invalid_image", f"The image is not accepted ({reason}: {detail}).")


class _Decoder:
    """One process."""

    def __init__(self, process: asyncio.subprocess.Process, pixels: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self._pixels, self._most, self._killed = pixels, max(pixels, MOST_BYTES), False

    @classmethod
    async def start(cls, settings: Settings) -> _Decoder:
        """A process that is ready. Raises OSError, EOFError or TimeoutError."""
        pixels = 3 * settings.side**2
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "llava_pipeline.serving.decoder", settings.written()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ} | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the server, which ends it
            limit=max(pixels, MOST_BYTES) + HEAD.size,  # an answer never fills it: its end is always noticed
        )
        decoder = cls(process, pixels)
        try:
            async with asyncio.timeout(START_SECONDS):
                kind, _ = await decoder._read()
            if kind != READY:
                raise EOFError("another answer than ready")
        except BaseException:
            await asyncio.shield(decoder.end())
            raise
        return decoder

    @property
    def alive(self) -> bool:
        return not self._killed and self._process.returncode is None and not self._stdout.at_eof()

    async def ask(self, kind: bytes, data: bytes) -> tuple[bytes, bytes]:
        """Kind and payload of the answer. Raises OSError or EOFError where the process dies."""
        self._stdin.write(HEAD.pack(kind, len(data)))
        self._stdin.write(data)
        await self._stdin.drain()
        return await self._read()

    async def _read(self) -> tuple[bytes, bytes]:
        kind, length = HEAD.unpack(await self._stdout.readexactly(HEAD.size))
        if length > self._most or (kind == PIXELS and length != self._pixels):
            raise EOFError("an answer of another length")
        return kind, await self._stdout.readexactly(length)

    def kill(self) -> None:
        self._killed = True
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)  # asyncio's own kill() may reap it before asyncio's watcher

    async def end(self) -> None:
        self.kill()
        self._stdin.close()
        code = await self._process.wait()
        if code not in (0, -signal.SIGKILL):
            log.warning("a process that decodes images ended with %s", code)


def _unavailable(why: str) -> PictureRejected:
    return PictureRejected(503, "decoder_unavailable", f"The image was not decoded: {why}. Try again.")
