"""The model, answering everybody at once: one thread that reads new questions between two tokens of those under way.

Nothing is computed twice that need not be: a picture's features are kept by its pixels, and the keys and values of a
conversation up to its last picture by those pixels, the words before them and the projector. Projectors are many, the
frozen parts one: each row carries the projector it was asked of, from beginning to end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from llava_pipeline.evaluation.read import stop_ids
from llava_pipeline.model.assemble import Llava
from llava_pipeline.serving.pictures import Picture
from llava_pipeline.serving.rows import Prefix, Rows, read_prefixes, read_suffixes, read_tokens
from llava_pipeline.serving.sampling import Sampling, choose
from llava_pipeline.serving.text import TextStream
from llava_pipeline.training.features import tower_features

log = logging.getLogger(__name__)
K = TypeVar("K")
V = TypeVar("V")
Ended = Literal["stop", "length"]
Failure = Literal["late", "closed", "failed"]


_Key = tuple[str, tuple[int, ...], tuple[str, ...]]  # of a projector, of words and image tokens, of pictures


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that can be shown, after so many tokens; ``ended`` says why it is the last piece."""

    text: str
    num_tokens: int
    ended: Ended | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """There will be no answer: it waited too long, the server is going, or the model failed."""

    why: Failure


@dataclass(frozen=True)
class Loaded:
    """A projector that answers. ``digest`` names its weights."""

    digest: str
    projector: nn.Module


@dataclass(eq=False)
class Ask:
    """One conversation to be answered.

    Args:
        loaded: the projector that is asked, whatever becomes champion meanwhile.
        prompt: token ids with the image tokens.
        pictures: in the order of their image tokens.
        late: on the clock of ``time.monotonic``, when it is no longer worth beginning.
        tell: is called from the engine's thread with every piece, and must not wait.
    """

    loaded: Loaded
    prompt: Sequence[int]
    pictures: Sequence[Picture]
    sampling: Sampling
    late: float
    tell: Callable[[Piece | Failed], None]
    cancelled: bool = False
    asked_at: float = field(default_factory=time.monotonic)


class Busy(Exception):
    """As many are waiting as may."""


class Closed(Exception):
    """The server is going."""


@dataclass(eq=False)
class _Answer:
    """A row under way."""

    ask: Ask
    text: TextStream
    generator: torch.Generator | None
    num_tokens: int = 0


class Engine:
    """Answers from one model.

    Args:
        llava: in place on its device; its own projector is not used.
        max_rows: conversations that are answered together.
        max_waiting: conversations that may wait beyond those.
        cache_bytes: memory for keys and values of pictures that were asked about.
    """

    def __init__(
        self, llava: Llava, *, max_rows: int = 16, max_waiting: int = 64, cache_bytes: int = 1 << 28
    ) -> None:  # fmt: skip
        self.llava, self.max_rows, self.max_waiting = llava, max_rows, max_waiting
        self.image_token_id = llava.processor.image_token_id
        self.stop_ids = stop_ids(llava)
        self.features: Kept[str, Tensor] = Kept(cache_bytes // 4, lambda value: value.nbytes)
        self.prefixes: Kept[_Key, Prefix] = Kept(cache_bytes, lambda value: value.num_bytes)
        self.waiting: deque[Ask] = deque()
        self.answers: list[_Answer] = []
        self.rows: Rows | None = None
        self.changed = threading.Condition()
        self.closing = False
        self.beat = time.monotonic()  # when the thread last came round: who stands still is not healthy
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.thread.start()

    def submit(self, ask: Ask) -> None:
        """Take a conversation.

        Raises:
            Busy: as many are waiting as may.
            Closed: the engine takes no more.
        """
        with self.changed:
            if self.closing:
                raise Closed
            if len(self.waiting) >= self.max_waiting:
                raise Busy
            self.waiting.append(ask)
            self.changed.notify()

    @property
    def num_waiting(self) -> int:
        """Conversations that have not been begun."""
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        """Conversations that are being answered."""
        return len(self.answers)

    def close(self, seconds: float) -> None:
        """Take no more, answer what was taken for so long, and tell the rest that it will not be."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        deadline = time.monotonic() + seconds
        while self.thread.is_alive() and time.monotonic() < deadline:
            self.thread.join(0.1)
        if self.thread.is_alive():
            for ask in [*self.waiting, *(answer.ask for answer in self.answers)]:
                ask.cancelled = True
                ask.tell(Failed("closed"))
            self.thread.join(5.0)

    def _work(self) -> None:
        while True:
            with self.changed:
                while not self.waiting and not self.answers:
                    if self.closing:
                        return
                    self.beat = time.monotonic()
                    self.changed.wait(1.0)
                new = self._next()
            self.beat = time.monotonic()
            try:
                self._drop_cancelled()
                if new:
                    self._begin(new)
                if self.answers:
                    self._step()
            except Exception:
                log.exception("the model failed; those who were being answered are told")
                self._fail([*new, *(answer.ask for answer in self.answers)])

    def _next(self) -> list[Ask]:
        """Those whose turn it is, less those that nobody waits for any more."""
        new: list[Ask] = []
        while self.waiting and len(self.answers) + len(new) < self.max_rows:
            ask = self.waiting.popleft()
            if ask.cancelled:
                continue
            if ask.late < time.monotonic():
                ask.tell(Failed("late"))
                continue
            new.append(ask)
        return new

    def _fail(self, asks: list[Ask]) -> None:
        self.answers, self.rows = [], None
        for ask in asks:
            ask.tell(Failed("failed"))

    def _drop_cancelled(self) -> None:
        self._keep([k for k, answer in enumerate(self.answers) if not answer.ask.cancelled])

    def _keep(self, numbers: list[int]) -> None:
        if len(numbers) == len(self.answers):
            return
        self.answers = [self.answers[k] for k in numbers]
        self.rows = self.rows.select(numbers) if self.rows is not None and numbers else None

    def _begin(self, new: list[Ask]) -> None:
        """Read what new conversations ask, beside those under way."""
        cuts = [self._cut(ask.prompt) for ask in new]
        prefixes = self._prefixes(new, [prefix for prefix, _ in cuts])
        rows = read_suffixes(self.llava.model, prefixes, [suffix for _, suffix in cuts])
        self.rows = rows if self.rows is None else self.rows.join(rows)
        decode = self.llava.processor.words
        self.answers += [
            _Answer(ask, TextStream(decode, ask.sampling.stops), ask.sampling.generator()) for ask in new
        ]  # fmt: skip

    def _cut(self, prompt: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A prompt up to its last image token, and what follows."""
        at = max((k for k, token in enumerate(prompt) if token == self.image_token_id), default=-1) + 1
        return tuple(prompt[:at]), tuple(prompt[at:])

    def _prefixes(self, asks: list[Ask], begun: list[tuple[int, ...]]) -> list[Prefix]:
        """What each conversation begins with, read now or before. Equal beginnings are read as one batch."""
        keys = [
            (ask.loaded.digest, prefix, tuple(picture.digest for picture in ask.pictures))
            for ask, prefix in zip(asks, begun, strict=True)
        ]
        found = {key: self.prefixes.get(key) if key[1] else Prefix([]) for key in keys}
        missing: dict[tuple[int, ...], dict[_Key, Ask]] = defaultdict(dict)
        for key, ask in zip(keys, asks, strict=True):
            if found[key] is None:
                missing[key[1]].setdefault(key, ask)
        self._look([ask for some in missing.values() for ask in some.values()])
        for prefix, some in missing.items():
            projected = torch.stack([self._projected(ask) for ask in some.values()])
            for key, read in zip(some, read_prefixes(self.llava.model, prefix, projected), strict=True):
                found[key] = read
                self.prefixes.put(key, read)
        return [found[key] or Prefix([]) for key in keys]

    @torch.inference_mode()
    def _look(self, asks: list[Ask]) -> None:
        """Features of every picture that has none yet, as one batch."""
        unseen = {
            picture.digest: picture
            for ask in asks
            for picture in ask.pictures
            if self.features.get(picture.digest) is None
        }
        if not unseen:
            return
        processor, model = self.llava.processor, self.llava.model
        pixels = torch.stack([torch.from_numpy(picture.pixels.copy()) for picture in unseen.values()])
        features = tower_features(model, processor.normalise(pixels.to(model.device)))
        for digest, one in zip(unseen, features, strict=True):
            self.features.put(digest, one.clone())

    @torch.inference_mode()
    def _projected(self, ask: Ask) -> Tensor:
        """(image tokens, D) of a conversation's pictures, by the projector that it asks."""
        projector = ask.loaded.projector
        seen = []
        for picture in ask.pictures:
            features = self.features.get(picture.digest)
            if features is None:  # more pictures at once than the memory for features holds
                self._look([ask])
                features = self.features.get(picture.digest)
            seen.append(features)
        dtype = next(projector.parameters()).dtype
        projected: Tensor = projector(torch.cat([one for one in seen if one is not None]).to(dtype))
        return projected

    @torch.inference_mode()
    def _step(self) -> None:
        """One token for every row; those that have ended leave."""
        if self.rows is None:
            return
        logits = self.llava.model.lm_head(self.rows.hidden)
        samplings = [answer.ask.sampling for answer in self.answers]
        tokens = choose(logits, samplings, [answer.generator for answer in self.answers])
        going = [k for k, token in enumerate(tokens) if self._tell(self.answers[k], token)]
        self._keep(going)
        if self.rows is not None and self.answers:
            chosen = torch.tensor([tokens[k] for k in going], device=self.rows.mask.device)
            self.rows = read_tokens(self.llava.model, self.rows, chosen)

    def _tell(self, answer: _Answer, token: int) -> bool:
        """Give out a token's text; whether the answer goes on."""
        answer.num_tokens += 1
        stream, longest = answer.text, answer.ask.sampling.max_tokens
        ended: Ended | None = None
        text = ""
        if token in self.stop_ids:
            ended = "stop"
        else:
            text = stream.push(token)
            if stream.stopped:
                ended = "stop"
            elif answer.num_tokens >= longest:
                ended = "length"
        if ended is not None:
            text += stream.finish()
        if text or ended is not None or answer.num_tokens == 1:
            answer.ask.tell(Piece(text, answer.num_tokens, ended))
        return ended is None


class Kept(Generic[K, V]):
    """What was used last, up to so many bytes."""

    def __init__(self, max_bytes: int, size: Callable[[V], int]) -> None:
        self.max_bytes, self.size = max_bytes, size
        self.values: OrderedDict[K, V] = OrderedDict()
        self.num_bytes = 0

    def get(self, key: K) -> V | None:
        """The value, which is then the last to go."""
        if (value := self.values.get(key)) is not None:
            self.values.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        """Keep a value; the longest unused ones go. The newest stays, however large."""
        if key in self.values:
            return
        self.values[key] = value
        self.num_bytes += self.size(value)
        while self.num_bytes > self.max_bytes and len(self.values) > 1:
            _, gone = self.values.popitem(last=False)
            self.num_bytes -= self.size(gone)
