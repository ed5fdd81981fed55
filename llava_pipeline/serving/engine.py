"""The model, answering everybody at once: one thread that reads new questions between two tokens of those under way.

Nothing is computed twice that need not be: a picture's features are kept by its pixels, and the keys and values of a
conversation up to its last picture by those pixels, the words before them and the projector. Projectors are many, the
frozen parts one: each row carries the projector it was asked of, from beginning to end, with the adapter that it was
trained with, if it was.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from llava_pipeline.errors import IncompatibleParts
from llava_pipeline.evaluation.read import stop_ids
from llava_pipeline.model import adapter, projector
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.tower import tower_features
from llava_pipeline.serving.pictures import Picture
from llava_pipeline.serving.rows import Prefix, Rows, read_prompts, read_suffixes, read_tokens
from llava_pipeline.serving.sampling import Sampling, choose
from llava_pipeline.serving.text import TextStream

log = logging.getLogger(__name__)
K = TypeVar("K")
V = TypeVar("V")
Ended = Literal["stop", "length"]
Failure = Literal["late", "closed", "failed"]


_NUMBERS = itertools.count(1)  # of adapters: one that goes and one that comes may have the same weights
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
    """A projector that answers.

    Args:
        digest: names its weights, and those of whatever was trained with it.
        adapter: name under which its adapter lies beside the language model; None where it has none.
        engine: of the language model that was trained whole with it; None where it reads the backbone's.
    """

    digest: str
    projector: nn.Module
    adapter: str | None = None
    engine: Engine | None = None


@dataclass(eq=False)
class Ask:
    """One conversation to be answered.

    Args:
        loaded: the projector that is asked, whatever becomes champion meanwhile.
        prompt: token ids with the image tokens.
        pictures: in the order of their image tokens.
        late: on the clock of ``time.monotonic``, when it is no longer worth beginning.
        tell: is called with every piece, one at a time and never after the last, from whichever thread; it must not
            wait. What it raises ends the answer, and nobody else's.
        cancelled: to be set by whoever asked: nothing is told any more, and the row is free within a token.
    """

    loaded: Loaded
    prompt: Sequence[int]
    pictures: Sequence[Picture]
    sampling: Sampling
    late: float
    tell: Callable[[Piece | Failed], None]
    cancelled: bool = False
    asked_at: float = field(default_factory=time.monotonic)
    begun_at: float | None = None  # when it was read, as the engine notes it


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

    Raises:
        IncompatibleParts: the chat template writes nothing behind a picture.
    """

    def __init__(
        self, llava: Llava, *, max_rows: int = 16, max_waiting: int = 64, cache_bytes: int = 1 << 28
    ) -> None:  # fmt: skip
        if llava.processor.prompt("?")[-1] == llava.processor.image_token_id:
            raise IncompatibleParts(
                "the template plain leaves out what is asked, so nothing can be asked; go on from this version with "
                "--stage instruct in another model.chat_template, and serve that"
            )
        self.llava, self.max_rows, self.max_waiting = llava, max_rows, max_waiting
        self.image_token_id = llava.processor.image_token_id
        self.stop_ids = stop_ids(llava)
        self.features: Kept[str, Tensor] = Kept(cache_bytes // 4, lambda value: value.nbytes)
        self.prefixes: Kept[_Key, Prefix] = Kept(cache_bytes, lambda value: value.num_bytes)
        self.waiting: deque[Ask] = deque()
        self.answers: list[_Answer] = []
        self.rows: Rows | None = None
        self.changed = threading.Condition()
        self.errands: deque[tuple[Callable[[], None], Future[None]]] = deque()  # to be done between two tokens
        self.num_adapters = 0
        self.others: WeakSet[Engine] = WeakSet()  # of language models that were trained whole, beside this one
        self.owed: set[Ask] = set()  # taken, and not told an end yet; whoever tells one holds ``changed``
        self.closing = False
        self.num_failures = 0  # readings and steps in a row that failed: with a card that is lost every one does
        self.beat = time.monotonic()  # when the thread last came round: who stands still is not healthy
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.thread.start()

    def submit(self, ask: Ask) -> None:
        """Take a conversation. It is told one end, unless it is cancelled before.

        Raises:
            Busy: as many are waiting as may.
            Closed: the engine takes no more.
        """
        if ask.loaded.engine not in (None, self):
            ask.loaded.engine.submit(ask)
            return
        with self.changed:
            if self.closing:
                raise Closed
            if len(self.waiting) >= self.max_waiting:
                self._drop_waiting()  # those that nobody waits for take nobody's place
            if len(self.waiting) >= self.max_waiting:
                raise Busy
            self.waiting.append(ask)
            self.owed.add(ask)
            self.changed.notify()

    def load_adapter(self, state: adapter.State) -> str:
        """Put an adapter beside the language model, between two tokens; its name.

        Raises:
            WeightsMismatch: it does not fit.
            Closed: the engine takes no more.
        """
        name = f"adapter{next(_NUMBERS)}"

        def put() -> None:
            adapter.put(self.llava.model.model.language_model, state, name)
            self.num_adapters += 1

        self._do(put).result()
        return name

    def drop_adapter(self, name: str) -> None:
        """Take an adapter away, that nobody asks any more, between two tokens of some time soon."""

        def remove() -> None:
            adapter.remove(self.llava.model.model.language_model, name)
            self.num_adapters -= 1

        with contextlib.suppress(Closed):
            self._do(remove)

    def _do(self, what: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        with self.changed:
            if self.closing:
                raise Closed
            self.errands.append((what, done))
            self.changed.notify()
        return done

    def _run_errands(self) -> None:
        while self.errands:
            what, done = self.errands.popleft()
            try:
                what()
            except Exception as error:  # whoever asked for it is told
                done.set_exception(error)
            else:
                done.set_result(None)

    def _asked(self, asks: Sequence[Ask]) -> AbstractContextManager[None]:
        """Within, each row is read with the adapter of the projector it asks."""
        if self.num_adapters == 0:
            return nullcontext()
        return adapter.asked(self.llava.model.model.language_model, [ask.loaded.adapter for ask in asks])

    def beside(self, state: projector.State) -> Engine:
        """An engine of a language model with other weights, which shares the vision tower with this one.

        Raises:
            WeightsMismatch: they do not fit.
            Closed: the engine takes no more.
        """
        own = self.llava.model
        copies: list[LlavaForConditionalGeneration] = []

        def copy_model() -> None:
            tower = own.model.vision_tower
            copies.append(copy.deepcopy(own, {id(tower): tower}))

        self._do(copy_model).result()  # between two tokens: while one is read, adapters may be told who asks them
        (model,) = copies
        adapter.remove_all(model.model.language_model)
        projector.copy_whole(model, state)
        with self.changed:
            if self.closing:
                raise Closed
            other = Engine(
                replace(self.llava, model=model), max_rows=self.max_rows, max_waiting=self.max_waiting,
                cache_bytes=self.prefixes.max_bytes,
            )  # fmt: skip
            self.others.add(other)
        return other

    @property
    def engines(self) -> list[Engine]:
        """This one, and those of language models that were trained whole and go on answering."""
        return [self, *(other for other in list(self.others) if not other.closing)]

    @property
    def num_waiting(self) -> int:
        """Conversations that have not been begun."""
        return len(self.waiting) + sum(other.num_waiting for other in list(self.others))

    @property
    def num_running(self) -> int:
        """Conversations that are being answered."""
        return len(self.answers) + sum(other.num_running for other in list(self.others))

    def retire(self) -> None:
        """Take no more, and end when what was taken is answered; from whichever thread, without waiting."""
        with self.changed:
            self.closing = True
            self.changed.notify()

    def close(self, seconds: float) -> None:
        """Take no more, answer what was taken for so long, and tell the rest that it will not be."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        until = time.monotonic() + seconds
        for other in list(self.others):
            other.close(max(0.0, until - time.monotonic()))
        seconds = max(0.0, until - time.monotonic())
        self.thread.join(min(seconds, threading.TIMEOUT_MAX))
        if not self.thread.is_alive():
            return
        with self.changed:  # from here, for the model may be in the midst of a long step
            for ask in list(self.owed):
                self._say(ask, Failed("closed"))
        self.thread.join(5.0)

    def _say(self, ask: Ask, told: Piece | Failed) -> None:
        """Tell what nobody has been told the end of. Who cannot be told is no longer answered; the others are."""
        with self.changed:
            if ask.cancelled:
                self.owed.discard(ask)
            if ask not in self.owed:
                return
            if isinstance(told, Failed) or told.ended is not None:
                self.owed.discard(ask)
            try:
                ask.tell(told)
            except Exception:  # it is the caller's, and may raise anything: an event loop that is closed does
                log.exception("an answer could not be told")
                self.owed.discard(ask)

    def _is_wanted(self, ask: Ask) -> bool:
        return ask in self.owed and not ask.cancelled

    def _work(self) -> None:
        while True:
            with self.changed:
                while not self.waiting and not self.answers and not self.errands:
                    if self.closing:
                        return
                    self.beat = time.monotonic()
                    self.changed.wait(1.0)
                self._drop_waiting()
                room = self.max_rows - len(self.answers)
                new = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
            self.beat = time.monotonic()
            self._run_errands()
            try:
                self._keep([k for k, answer in enumerate(self.answers) if self._is_wanted(answer.ask)])
                if new:
                    self._begin(new)
                if self.answers:
                    self._step()
                    self.num_failures = 0
            except Exception:  # the thread answers everybody: whatever the model raises, the next are answered
                self.num_failures += 1
                log.exception("the model failed; those who were being answered are told")
                self._fail([*new, *(answer.ask for answer in self.answers)])
            new = []  # whose projectors may go when they are answered

    def _drop_waiting(self) -> None:
        """Those that are cancelled or late wait no longer, whether or not there is room to begin them."""
        now = time.monotonic()
        for ask in self.waiting:
            if ask.cancelled:
                self.owed.discard(ask)
            elif ask.late < now:
                self._say(ask, Failed("late"))
        self.waiting = deque(ask for ask in self.waiting if self._is_wanted(ask))

    def _fail(self, asks: list[Ask]) -> None:
        self.answers, self.rows = [], None
        for ask in asks:
            self._say(ask, Failed("failed"))

    def _keep(self, numbers: list[int]) -> None:
        """Go on with some of the rows."""
        if len(numbers) == len(self.answers):
            return
        kept = [self.answers[k] for k in numbers]
        for answer in self.answers:
            if answer.ask.cancelled:
                self.owed.discard(answer.ask)
        self.rows = self.rows.select(numbers) if self.rows is not None and numbers else None
        self.answers = kept

    def _begin(self, new: list[Ask]) -> None:
        """Read what new conversations ask, beside those under way.

        Where that fails they are read one by one, so that what is wrong with one costs no other its answer.
        """
        try:
            order, read = self._read(new)
            rows = read if self.rows is None else self.rows.join(read)
            answers = [
                _Answer(ask, TextStream(self.llava.processor.words, ask.sampling.stops), ask.sampling.generator())
                for ask in order
            ]
        except Exception:
            if len(new) > 1:
                for ask in new:
                    self._begin([ask])
                return
            self.num_failures += 1
            log.exception("a conversation could not be read; whoever asked is told")
            self._say(new[0], Failed("failed"))
            return
        self.rows = rows
        self.answers += answers
        for ask in new:
            ask.begun_at = time.monotonic()

    def _cut(self, prompt: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A prompt up to its last image token, and what follows."""
        at = max((k for k, token in enumerate(prompt) if token == self.image_token_id), default=-1) + 1
        if at == len(prompt):
            raise ValueError("a prompt has at least one token behind its last picture")
        return tuple(prompt[:at]), tuple(prompt[at:])

    def _read(self, asks: list[Ask]) -> tuple[list[Ask], Rows]:
        """Conversations up to where their answers begin, in another order: who begins as somebody else did reads on
        from there, the others are read whole."""
        cuts = [self._cut(ask.prompt) for ask in asks]
        keys = [
            (ask.loaded.digest, prefix, tuple(picture.digest for picture in ask.pictures))
            for ask, (prefix, _) in zip(asks, cuts, strict=True)
        ]
        found = {key: self.prefixes.get(key) if key[1] else Prefix([]) for key in keys}
        whole = [n for n, key in enumerate(keys) if found[key] is None and keys.index(key) == n]
        rest = [n for n in range(len(asks)) if n not in whole]
        parts = []
        if whole:
            rows, prefixes = self._read_whole([asks[n] for n in whole], [len(cuts[n][0]) for n in whole])
            parts.append(rows)
            for n, prefix in zip(whole, prefixes, strict=True):
                found[keys[n]] = prefix
                if prefix.is_finite:  # what went wrong once is not kept
                    self.prefixes.put(keys[n], prefix)
        if rest:
            begun = [found[keys[n]] or Prefix([]) for n in rest]
            with self._asked([asks[n] for n in rest]):
                parts.append(read_suffixes(self.llava.model, begun, [cuts[n][1] for n in rest]))
        order = [asks[n] for n in whole + rest]
        return order, parts[0] if len(parts) == 1 else parts[0].join(parts[1])

    def _read_whole(self, asks: list[Ask], lengths: list[int]) -> tuple[Rows, list[Prefix]]:
        seen = self._look(asks)
        projected = [self._projected(ask, seen) for ask in asks]
        with self._asked(asks):
            return read_prompts(self.llava.model, [ask.prompt for ask in asks], projected, lengths)

    @torch.inference_mode()
    def _look(self, asks: list[Ask]) -> dict[str, Tensor]:
        """Features of every picture by its digest; of those that are not known, as one batch."""
        pictures = {picture.digest: picture for ask in asks for picture in ask.pictures}
        # Held here and not looked up again: they may be more than the memory for features holds.
        known = {digest: self.features.get(digest) for digest in pictures}
        unseen = [picture for digest, picture in pictures.items() if known[digest] is None]
        if unseen:
            processor, model = self.llava.processor, self.llava.model
            pixels = torch.stack([torch.from_numpy(picture.pixels.copy()) for picture in unseen])
            features = tower_features(model, processor.normalise(pixels.to(model.device)))
            for picture, row in zip(unseen, features, strict=True):
                one = known[picture.digest] = row.clone()  # alone, so that it does not hold the whole batch
                if torch.isfinite(one).all():
                    self.features.put(picture.digest, one)
        return {digest: one for digest, one in known.items() if one is not None}

    @torch.inference_mode()
    def _projected(self, ask: Ask, seen: dict[str, Tensor]) -> Tensor:
        """(image tokens, D) of a conversation's pictures, by the projector that it asks."""
        projector = ask.loaded.projector
        dtype = next(projector.parameters()).dtype
        features = torch.cat([seen[picture.digest] for picture in ask.pictures])
        projected: Tensor = projector(features.to(dtype))
        return projected

    @torch.inference_mode()
    def _step(self) -> None:
        """One token for every row; those that have ended leave."""
        if self.rows is None:
            return
        logits = self._finite(self.llava.model.lm_head(self.rows.hidden))
        samplings = [answer.ask.sampling for answer in self.answers]
        tokens = choose(logits, samplings, [answer.generator for answer in self.answers])
        going = [k for k, token in enumerate(tokens) if self._tell(self.answers[k], token)]
        self._keep(going)
        if self.rows is not None and self.answers:
            chosen = torch.tensor([tokens[k] for k in going], device=self.rows.mask.device)
            with self._asked([answer.ask for answer in self.answers]):
                self.rows = read_tokens(self.llava.model, self.rows, chosen)

    def _finite(self, logits: Tensor) -> Tensor:
        """The logits of the rows that have numbers; the others are told, and leave."""
        well = torch.isfinite(logits).all(-1).tolist()
        if all(well):
            return logits
        for answer, is_well in zip(self.answers, well, strict=True):
            if not is_well:
                log.error("the model gives no numbers for a conversation; whoever asked is told")
                self._say(answer.ask, Failed("failed"))
        going = [k for k, is_well in enumerate(well) if is_well]
        self._keep(going)
        return logits[going]

    def _tell(self, answer: _Answer, token: int) -> bool:
        """Give out a token's text; whether the answer goes on."""
        answer.num_tokens += 1
        try:
            text, ended = self._text(answer, token)
        except Exception:  # what tokenizers raise has no base of its own
            log.exception("a token has no text; whoever asked is told")
            self._say(answer.ask, Failed("failed"))
            return False
        if text or ended is not None or answer.num_tokens == 1:
            self._say(answer.ask, Piece(text, answer.num_tokens, ended))
        return self._is_wanted(answer.ask)

    def _text(self, answer: _Answer, token: int) -> tuple[str, Ended | None]:
        """What a token adds to the text that can be shown, and why the answer ends with it."""
        stream = answer.text
        if token in self.stop_ids:
            return stream.finish(), "stop"
        text = stream.push(token)
        if stream.stopped:
            return text, "stop"
        if answer.num_tokens < answer.ask.sampling.max_tokens:
            return text, None
        text += stream.finish()
        return text, "stop" if stream.stopped else "length"


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
