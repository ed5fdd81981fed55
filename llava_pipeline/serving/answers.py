"""One request's way to its answer: the version it asks, its words, its pictures, a place in the engine's queue."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from llava_pipeline.model.processor import Processor
from llava_pipeline.serving import wire
from llava_pipeline.serving.conversation import Turn, prompt_of
from llava_pipeline.serving.engine import Ask, Busy, Closed, Engine, Failed, Failure, Kept, Piece
from llava_pipeline.serving.image_urls import is_data_uri
from llava_pipeline.serving.metrics import Metrics
from llava_pipeline.serving.pictures import Picture, PictureRejected, Pictures
from llava_pipeline.serving.versions import Version, Versions
from llava_pipeline.serving.wire import ChatRequest, Rejected

DEFAULT_TOKENS = 256  # of an answer whose request names no limit
MAX_CHARACTERS = 32  # of a token: more text than this cannot fit, and is not tokenised
RETRY_SECONDS = 1
SEEN_BYTES = 1 << 25
SHORT = 2000  # characters that are tokenised sooner than a thread is found for them
WHY: dict[Failure, tuple[str, str]] = {
    "late": ("overloaded", "The question waited too long for its turn. Try again."),
    "closed": ("server_closing", "The server is closing. Try again."),
    "failed": ("model_failed", "The model could not answer this. Try again."),
}


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for, and how long it may take."""

    max_pictures: int = 8
    waiting_seconds: float = 30.0  # until it is begun
    answer_seconds: float = 120.0  # until it has ended


class Answer:
    """An answer under way. Its pieces come from the engine's thread."""

    def __init__(self, version: Version, num_prompt_tokens: int, num_image_tokens: int, deadline: float) -> None:
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.version = version
        self.num_prompt_tokens, self.num_image_tokens, self.num_tokens = num_prompt_tokens, num_image_tokens, 0
        self.ask: Ask | None = None
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[Piece | Failed] = asyncio.Queue()

    def tell(self, told: Piece | Failed) -> None:
        """From the engine's thread."""
        self._loop.call_soon_threadsafe(self._told.put_nowait, told)

    async def next(self) -> Piece:
        """The next piece.

        Raises:
            Rejected: there will be none.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                told = await self._told.get()
        except TimeoutError:
            if self._loop.time() < self._deadline:
                raise  # somebody else's patience
            raise Rejected(503, "timeout", "The answer took too long.", retry_after=RETRY_SECONDS) from None
        if isinstance(told, Failed):
            code, message = WHY[told.why]
            raise Rejected(503, code, message, retry_after=RETRY_SECONDS)
        self.num_tokens = told.num_tokens
        return told

    def leave(self) -> None:
        """Nobody waits for it any more; nothing where it has ended."""
        if self.ask is not None:
            self.ask.cancelled = True

    @property
    def waited(self) -> float:
        """Seconds in the queue."""
        return 0.0 if self.ask is None or self.ask.begun_at is None else self.ask.begun_at - self.ask.asked_at

    @property
    def usage(self) -> wire.Usage:
        """Tokens so far."""
        return wire.usage(self.num_prompt_tokens, self.num_image_tokens, self.num_tokens)


class Desk:
    """Takes requests to the engine."""

    def __init__(
        self, versions: Versions, engine: Engine, pictures: Pictures, processor: Processor, context: int,
        metrics: Metrics, limits: Limits,
    ) -> None:  # fmt: skip
        self.versions, self.engine, self.pictures, self.metrics = versions, engine, pictures, metrics
        self._processor, self._context, self._limits = processor, context, limits
        self._seen: Kept[bytes, Picture] = Kept(SEEN_BYTES, lambda picture: picture.pixels.nbytes)

    async def begin(self, request: ChatRequest) -> Answer:
        """Put a request's question into the queue.

        Raises:
            Rejected: it cannot be answered, or not now.
        """
        began, loop = time.monotonic(), asyncio.get_running_loop()
        deadline = loop.time() + self._limits.answer_seconds
        version = self._version(request.model)
        pictures = wire.pictures_of(request)
        prompt = await self._prompt(wire.turns_of(request.messages), len(pictures))
        longest = self._longest(request, len(prompt))
        try:
            async with asyncio.timeout(self._limits.waiting_seconds):
                seen = [await self._picture(param, url) for param, url in pictures]
        except TimeoutError:
            raise Rejected(503, *WHY["late"], retry_after=RETRY_SECONDS) from None
        answer = Answer(version, len(prompt), len(pictures) * self._processor.num_image_tokens, deadline)
        late = began + self._limits.waiting_seconds
        answer.ask = Ask(version.loaded, prompt, seen, request.sampling(longest), late, answer.tell)
        try:
            self.engine.submit(answer.ask)
        except Busy:
            message = "As many questions are waiting as may."
            raise Rejected(429, "rate_limit_exceeded", message, retry_after=RETRY_SECONDS) from None
        except Closed:
            raise Rejected(503, *WHY["closed"], retry_after=RETRY_SECONDS) from None
        return answer

    def _version(self, name: str | None) -> Version:
        if (version := self.versions.main if name is None else self.versions.named(name)) is None:
            message = "No model of this name is served here; GET /v1/models lists those that are."
            raise Rejected(404, "model_not_found", message, "model")
        return version

    async def _prompt(self, turns: Sequence[Turn], num_pictures: int) -> list[int]:
        if num_pictures > self._limits.max_pictures:
            message = f"There are {num_pictures} pictures; at most {self._limits.max_pictures} are looked at together."
            raise Rejected(400, "too_many_images", message, "messages")
        characters = sum(len(turn.text) for turn in turns)
        if characters > self._context * MAX_CHARACTERS:
            raise self._too_long(f"The messages have {characters} characters")
        if characters < SHORT:
            return prompt_of(self._processor, turns)
        return await asyncio.to_thread(prompt_of, self._processor, turns)

    def _longest(self, request: ChatRequest, num_prompt_tokens: int) -> int:
        room = self._context - num_prompt_tokens
        longest = request.wanted_tokens or min(DEFAULT_TOKENS, room)
        if longest > room or room < 1:
            asked = f" and the answer may take {request.wanted_tokens}" if request.wanted_tokens else ""
            raise self._too_long(f"The messages take {num_prompt_tokens} tokens{asked}")
        return longest

    def _too_long(self, found: str) -> Rejected:
        message = f"{found}; this model's context is {self._context} tokens. Ask for less."
        return Rejected(400, "context_length_exceeded", message, "messages")

    async def _picture(self, param: str, url: str) -> Picture:
        """Decoded once, while it is asked about."""
        key = hashlib.sha256(url.encode("utf-8", "surrogatepass")).digest()
        if (picture := self._seen.get(key)) is not None:
            return picture
        began = time.monotonic()
        try:
            picture = await self.pictures.load(url)
        except PictureRejected as refused:
            self.metrics.rejected_images.labels(refused.code).inc()
            raise Rejected(refused.status, refused.code, refused.message, param, _again(refused.status)) from None
        self.metrics.decode.observe(time.monotonic() - began)
        if is_data_uri(url):  # what lies at an address may change
            self._seen.put(key, picture)
        return picture


def _again(status: int) -> int | None:
    return RETRY_SECONDS if status == 503 else None
