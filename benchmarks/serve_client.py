"""What ``benchmarks/serve.py`` asks, and an HTTP client that costs little beside the servers it measures.

The questions are asked about scenes of the test split: no projector was trained on their layouts. ``known`` pictures
are few and come again, so that a server may keep what it has read of them; a ``new`` picture never comes twice.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llava_pipeline.data import scenes

SEED, FIRST_KNOWN, FIRST_NEW = 1, 5_000_000, 6_000_000  # far beyond what a run evaluates
SHORT_TOKENS, CAPTION_TOKENS = 8, 64
TIMEOUT = 120.0


@dataclass(frozen=True)
class Asked:
    """A question about a picture, with the answer that is right."""

    body: dict[str, Any]
    truth: str
    kind: str

    def request(self, **more: Any) -> bytes:
        """The bytes of an HTTP request."""
        body = json.dumps(self.body | more).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


def _asked(url: str, question: scenes.Question) -> Asked:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
    tokens = CAPTION_TOKENS if question.kind == "caption" else SHORT_TOKENS
    message = {"role": "user", "content": content}
    return Asked({"model": "champion", "messages": [message], "max_tokens": tokens}, question.answer, question.kind)


def _data_uri(scene: scenes.Scene) -> str:
    buffer = io.BytesIO()
    scenes.draw(scene).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def known(num_pictures: int, captions: bool = False) -> list[Asked]:
    """Up to six short questions, one of each kind, about each of some pictures; or their captions instead."""
    out = []
    for index in range(FIRST_KNOWN, FIRST_KNOWN + num_pictures):
        scene, rng = scenes.scene_at(SEED, "test", index)
        url = _data_uri(scene)
        kinds = [scenes.ask_caption] if captions else list(scenes.ASK.values())
        out += [_asked(url, question) for ask in kinds if (question := ask(rng, scene)) is not None]
    return out


def new() -> Iterator[Asked]:
    """One short question about each of pictures without end."""
    for index in itertools.count(FIRST_NEW):
        scene, (question,) = scenes.questions_at(SEED, "test", index)
        yield _asked(_data_uri(scene), question)


@dataclass
class Reply:
    """What came back. ``models`` are (model, system_fingerprint) of the reply, or of all its pieces."""

    status: int = 0
    text: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    models: set[tuple[str, str]] = field(default_factory=set)
    started: float = 0.0
    seconds: float = 0.0
    seconds_to_first: float | None = None
    done: bool = True  # a stream said [DONE], and no piece was an error
    error: str | None = None

    @property
    def is_whole(self) -> bool:
        """An answer, and all of it."""
        return self.status == 200 and self.error is None and self.done


class Client:
    """One connection that is kept alive."""

    def __init__(self, url: str) -> None:
        split = urlsplit(url)
        self.host, self.port = split.hostname or "127.0.0.1", split.port or 80
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> Reply:
        """Send one request and read all of its answer; what fails is told in ``error``."""
        reply = Reply(started=time.monotonic())
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._ask(request, reply)
        except (OSError, EOFError, ValueError, LookupError, TimeoutError) as error:
            reply.error = repr(error)
            await self.close()
        reply.seconds = time.monotonic() - reply.started
        return reply

    async def close(self) -> None:
        """Hang up."""
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None

    async def _ask(self, request: bytes, reply: Reply) -> None:
        if self.reader is None or self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port, limit=1 << 20)
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        reply.status = int(head[0].split(" ")[1])
        reply.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        if reply.headers.get("content-type", "").startswith("text/event-stream"):
            reply.done = False
            rest = b""
            async for data in self._chunks():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._event(line.strip(), reply)
        else:
            length = reply.headers.get("content-length")
            whole = [await self.reader.readexactly(int(length))] if length else [x async for x in self._chunks()]
            document = json.loads(b"".join(whole))
            if reply.status == 200:
                reply.text = document["choices"][0]["message"]["content"]
                reply.models = {(document["model"], document.get("system_fingerprint", ""))}
            else:
                reply.text = json.dumps(document)
        if reply.headers.get("connection") == "close":
            await self.close()

    async def _chunks(self) -> Any:
        assert self.reader is not None
        while size := int((await self.reader.readline()).split(b";")[0], 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()

    def _event(self, line: bytes, reply: Reply) -> None:
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            reply.done = reply.error is None
            return
        document = json.loads(data)
        if "error" in document:
            reply.error = json.dumps(document["error"])
            return
        reply.models.add((document["model"], document.get("system_fingerprint", "")))
        for choice in document["choices"]:
            if text := choice.get("delta", {}).get("content"):
                reply.text += text
                if reply.seconds_to_first is None:
                    reply.seconds_to_first = time.monotonic() - reply.started


async def ask_all(url: str, requests: list[bytes], num_clients: int) -> list[Reply]:
    """Each request once, in order, by so many clients at once."""
    replies: list[Reply | None] = [None] * len(requests)
    numbers = iter(range(len(requests)))

    async def one() -> None:
        client = Client(url)
        for number in numbers:
            replies[number] = await client.ask(requests[number])
        await client.close()

    await asyncio.gather(*(one() for _ in range(num_clients)))
    return [reply for reply in replies if reply is not None]


async def ask_for(url: str, requests: Iterator[bytes], num_clients: int, seconds: float) -> tuple[list[Reply], float]:
    """As many as ``num_clients`` get answered one after another in so many seconds, and the time it really took."""
    replies: list[Reply] = []
    started = time.monotonic()

    async def one() -> None:
        client = Client(url)
        while time.monotonic() - started < seconds and (request := next(requests, None)) is not None:
            replies.append(await client.ask(request))
        await client.close()

    await asyncio.gather(*(one() for _ in range(num_clients)))
    return replies, time.monotonic() - started
