"""Which projectors answer, and how they change: fetched beside those that answer, tried out, then put in their place.

A version that cannot be had or does not answer as it did when it was registered changes nothing; that it was refused,
and why, is told.
"""

from __future__ import annotations

import copy
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from llava_pipeline.contracts import AssembledModel
from llava_pipeline.data.images import ImageRefused, decode
from llava_pipeline.errors import (
    DamagedArtifact,
    IncompatibleParts,
    LlavaPipelineError,
    NoSuchRun,
    TrackingUnavailable,
    WeightsMismatch,
)
from llava_pipeline.model import adapter, projector
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.freeze import LANGUAGE_MODEL
from llava_pipeline.serving.conversation import prompt_of, question
from llava_pipeline.serving.engine import Ask, Busy, Closed, Engine, Failed, Loaded, Piece
from llava_pipeline.serving.pictures import Picture, picture_of
from llava_pipeline.serving.sampling import Sampling
from llava_pipeline.tracking import bundle as bundles
from llava_pipeline.tracking import registry
from llava_pipeline.tracking.bundle import Bundle
from llava_pipeline.tracking.client import first_line
from llava_pipeline.tracking.settings import Settings
from llava_pipeline.training.loop import is_out_of_memory

log = logging.getLogger(__name__)
GOLDEN_SECONDS = 60.0
GOLDEN_TOKENS = 64
REFUSED = (DamagedArtifact, WeightsMismatch, IncompatibleParts)  # asking again would give the same


class NotTried(LlavaPipelineError):
    """The engine did not answer a golden question: it is busy, fails, or goes. It may when it is asked again."""


@dataclass(frozen=True)
class Version:
    """A version that answers."""

    bundle: Bundle
    loaded: Loaded
    loaded_at: float = field(default_factory=time.time)  # seconds since the epoch

    @property
    def name(self) -> str:
        """As a model's name that means this version and no other."""
        return f"{self.bundle.registered_model}-v{self.bundle.version}"

    @property
    def fingerprint(self) -> str:
        """Version and weights."""
        return f"v{self.bundle.version}-{self.bundle.projector_digest[:12]}"


@dataclass(frozen=True, slots=True)
class _Golden:
    """A question that is answered as it was when the version was evaluated."""

    picture: Picture
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a version does not answer, and whether that is final: it is not fetched and tried again."""

    told: str
    is_final: bool


class Versions:
    """The versions behind some aliases of a registered model, the first of which is asked by default.

    Args:
        aliases: the first one must have a version, the others may.
    """

    def __init__(
        self, name: str, aliases: Sequence[str], llava: Llava, model: AssembledModel, engine: Engine, settings: Settings
    ) -> None:
        self.name, self.aliases, self.engine, self.settings = name, tuple(aliases), engine, settings
        self._llava, self._model = llava, model
        self.by_alias: dict[str, Version] = {}  # replaced as a whole: who reads it sees one moment
        self.problems: dict[str, str] = {}  # likewise; by alias, why what it points to does not answer
        self.num_swaps = self.num_refused = 0
        self._failed: dict[str, _Failure] = {}  # by version, while an alias points to it
        self._looking = threading.Lock()
        self._unswept = True

    @property
    def main(self) -> Version | None:
        """The version behind the first alias."""
        return self.by_alias.get(self.aliases[0])

    @property
    def last_error(self) -> str | None:
        """Why the first alias's newest version does not answer; None where it does."""
        return self.problems.get(self.aliases[0])

    def named(self, name: str) -> Version | None:
        """The version that a model's name means: an alias, or a version that answers under one."""
        found = self.by_alias
        return found.get(name) or next((version for version in found.values() if version.name == name), None)

    def look(self) -> None:
        """See what the aliases point to, and follow. Never raises: what answers goes on answering."""
        try:
            with self._looking:
                with bundles.in_use(self.name):
                    self._look()
                if self._unswept:
                    self._unswept = not bundles.sweep(self.name)
        except Exception as error:
            log.exception("the aliases could not be followed; what answers goes on answering")
            self._trouble(self.aliases[0], f"the aliases of {self.name} cannot be followed: {error}")

    def _look(self) -> None:
        try:
            now = registry.aliases(self.name, self.settings)
        except LlavaPipelineError as error:
            self._trouble(self.aliases[0], f"the registry cannot be read: {error}")
            return
        wanted = {now.get(alias) for alias in self.aliases}
        self._failed = {version: failure for version, failure in self._failed.items() if version in wanted}
        # Whatever answers now can be put behind every alias, in whichever order they have moved.
        had = {version.bundle.version: version for version in self.by_alias.values()}
        for alias in self.aliases:
            self._follow(alias, now.get(alias), had)

    def start(self) -> None:
        """Load what the aliases point to; where MLflow is away or the version is refused, what answered last.

        Raises:
            NoSuchRun: the first alias points to nothing.
            LlavaPipelineError: its version cannot be loaded, and no other one is kept.
        """
        self.look()
        for alias in self.aliases[1:]:
            if alias not in self.by_alias and alias not in self.problems:
                log.warning("%s has no alias %s; it is served as soon as it has", self.name, alias)
        if self.main is not None:
            return
        alias = self.aliases[0]
        if (told := self.problems.get(alias)) is None:
            raise NoSuchRun(f"{self.name} has no alias {alias!r}; run the profile first, or name another --alias")
        with self._looking, bundles.in_use(self.name):
            if (last := bundles.kept(self.name, alias)) is None:
                raise TrackingUnavailable(f"{told}; and no version that answered before is kept here")
            self._put(alias, self.load(last))
        self._trouble(alias, told)
        log.warning("version %s answers, which did so last", last.version)

    def _follow(self, alias: str, version: str | None, had: dict[str, Version]) -> None:
        if version is None:
            self._gone(alias)
            return
        if (same := had.get(version)) is not None:  # nothing moved, or a challenger was promoted
            self._put(alias, same)
            return
        failure = self._failed.get(version)
        if failure is None or not failure.is_final:
            try:
                had[version] = self.load(bundles.fetch(self.name, version, self.settings))
            except Exception as error:  # files of anybody's making, read by several libraries
                failure = self._refuse(version, error)
            else:
                self._failed.pop(version, None)
                self._put(alias, had[version])
                return
        self._trouble(alias, failure.told)

    def _refuse(self, version: str, error: Exception) -> _Failure:
        """Remember why a version does not answer; it is counted once, however often it is tried."""
        # A file that could not be read may be read the next time, whatever it was taken for; one that is missing not.
        unread = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)
        is_final = isinstance(error, REFUSED) and not unread
        failure = _Failure(f"version {version} does not answer: {error}", is_final)
        if version not in self._failed:
            self.num_refused += 1
            if not isinstance(error, LlavaPipelineError):
                log.error("version %s cannot be loaded", version, exc_info=error)
        self._unswept |= failure.is_final
        self._failed[version] = failure
        return failure

    def _gone(self, alias: str) -> None:
        """An alias points to nothing: what it pointed to goes on answering where it is the first one."""
        old = self.by_alias.get(alias)
        if alias == self.aliases[0]:
            self._trouble(alias, None if old is None else f"{self.name} has no alias {alias} any more")
            return
        self._trouble(alias, None)
        bundles.forget(self.name, alias)
        if old is not None:
            self.by_alias = {name: one for name, one in self.by_alias.items() if name != alias}
            self._unswept = True
            log.info("%s has no alias %s any more", self.name, alias)

    def _put(self, alias: str, version: Version) -> None:
        """Who asks from now on is answered by this version; who was asking before is answered by the one before."""
        self._trouble(alias, None)
        if version is self.by_alias.get(alias):
            return
        self.by_alias = self.by_alias | {alias: version}
        self.num_swaps += 1
        self._unswept = True
        log.info("%s is version %s of %s", alias, version.bundle.version, self.name)
        try:
            bundles.keep(alias, version.bundle)
        except (OSError, LlavaPipelineError) as error:
            log.warning("version %s answers, but is not kept for a start without MLflow: %s", version.name, error)

    def _trouble(self, alias: str, told: str | None) -> None:
        """Why what an alias points to does not answer; None where it does."""
        if self.problems.get(alias) == told:
            return
        others = {name: why for name, why in self.problems.items() if name != alias}
        self.problems = others if told is None else others | {alias: told}
        if told is not None:
            log.warning("%s: %s", alias, told)

    def load(self, bundle: Bundle) -> Version:
        """A version, beside those that answer: its weights checked, and its golden questions asked.

        Raises:
            IncompatibleParts: it was trained between other parts.
            WeightsMismatch, DamagedArtifact: its weights are damaged, or it does not answer as it did.
            NotTried: the engine does not answer.
        """
        bundle.check()
        bundle.spec()  # a start without MLflow reads it
        module = copy.deepcopy(self._llava.model.model.multi_modal_projector)
        parts = projector.split(projector.load(bundle.projector, self._model))
        state, beside = parts[""], parts[adapter.PREFIX]
        shapes, wanted = _shapes(state), _shapes(module.state_dict())
        if shapes != wanted:
            raise WeightsMismatch(
                f"the projector of version {bundle.version} has {shapes}, the model {wanted}; train it again"
            )
        module.load_state_dict(state, strict=True)
        version = Version(bundle, self._loaded(bundle.projector_digest, module, beside, parts[LANGUAGE_MODEL]))
        self._try_out(version)
        return version

    def _loaded(self, digest: str, module: nn.Module, beside: adapter.State, whole: projector.State) -> Loaded:
        """The projector with its adapter beside the language model, or with a language model of its own; they go when
        nobody is answered by them any more."""
        try:
            name = self.engine.load_adapter(beside) if beside else None
            engine = self.engine.beside(whole) if whole else None
        except Closed:
            raise NotTried("the server is going") from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise IncompatibleParts(  # final: trying again at every look would hold up everybody's answers
                "its language model was trained whole and does not fit beside the one that answers; free memory, or "
                "serve it alone (stop this server and start it on that version)"
            ) from error
        loaded = Loaded(digest, module, name, engine)
        if name is not None:
            weakref.finalize(loaded, self.engine.drop_adapter, name)
        if engine is not None:
            weakref.finalize(loaded, engine.retire)
        return loaded

    def _try_out(self, version: Version) -> None:
        """Ask the golden questions; this warms the model too."""
        folder = version.bundle.folder / "golden"
        if not (folder / "questions.json").is_file():
            log.warning("version %s has no golden questions: it is served untried", version.bundle.version)
            return
        for golden in self._golden(version, folder):
            said = self._say(version, golden.picture, golden.question)
            if said != golden.answer:
                raise DamagedArtifact(
                    f"version {version.bundle.version} answers {said!r} to {golden.question!r}, not "
                    f"{golden.answer!r} as when it was evaluated; train again or choose another version"
                )

    def _golden(self, version: Version, folder: Path) -> list[_Golden]:
        try:
            return [
                _Golden(self._picture(folder / str(one["picture"])), str(one["question"]), str(one["answer"]))
                for one in json.loads((folder / "questions.json").read_text(encoding="utf-8"))
            ]
        except (OSError, ValueError, KeyError, TypeError, ImageRefused) as error:
            raise DamagedArtifact(
                f"the golden questions of version {version.bundle.version} cannot be read ({first_line(error)}); "
                "train again or choose another version"
            ) from error

    def _picture(self, path: Path) -> Picture:
        return picture_of(self._llava.processor.resize(decode(path.read_bytes())))

    def _say(self, version: Version, picture: Picture, text: str) -> str:
        prompt = prompt_of(self._llava.processor, question(text, with_image=True))
        answer: Future[str] = Future()
        pieces: list[str] = []

        def tell(told: Piece | Failed) -> None:
            if isinstance(told, Failed):
                # The model may be short of memory for a moment; weights that are no numbers were refused before.
                answer.set_exception(NotTried(f"version {version.bundle.version} does not answer ({told.why})"))
                return
            pieces.append(told.text)
            if told.ended is not None:
                answer.set_result("".join(pieces))

        late = time.monotonic() + GOLDEN_SECONDS
        ask = Ask(version.loaded, prompt, (picture,), Sampling(max_tokens=GOLDEN_TOKENS), late, tell)
        while True:
            try:
                self.engine.submit(ask)
                return answer.result(GOLDEN_SECONDS)
            except Busy:
                if time.monotonic() > late:
                    raise NotTried("the server is too busy to try a new version") from None
                time.sleep(0.05)
            except Closed:
                raise NotTried("the server is going") from None
            except TimeoutError:
                ask.cancelled = True
                raise NotTried(
                    f"version {version.bundle.version} took more than {GOLDEN_SECONDS:g} s for a golden question"
                ) from None


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(state[name].shape) for name in sorted(state)}


class Follower:
    """Looks every so many seconds, in a thread of its own. A look does not raise, as ``Versions.look`` does not."""

    def __init__(self, look: Callable[[], None], seconds: float) -> None:
        self._look, self._seconds, self._ending = look, seconds, threading.Event()
        self._thread = threading.Thread(target=self._work, name="follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._ending.set()
        self._thread.join(5.0)

    def _work(self) -> None:
        while not self._ending.wait(self._seconds):
            self._look()
