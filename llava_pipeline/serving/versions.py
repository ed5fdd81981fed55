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
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from llava_pipeline.contracts import AssembledModel
from llava_pipeline.errors import DamagedArtifact, LlavaPipelineError, NoSuchRun, TrackingUnavailable
from llava_pipeline.model import projector
from llava_pipeline.model.assemble import Llava
from llava_pipeline.serving.conversation import prompt_of, question
from llava_pipeline.serving.engine import Ask, Busy, Engine, Failed, Loaded, Piece
from llava_pipeline.serving.pictures import picture_of
from llava_pipeline.serving.sampling import Sampling
from llava_pipeline.tracking import bundle as bundles
from llava_pipeline.tracking import registry
from llava_pipeline.tracking.bundle import Bundle
from llava_pipeline.tracking.settings import Settings

log = logging.getLogger(__name__)
GOLDEN_SECONDS = 60.0
GOLDEN_TOKENS = 64


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
        self.problems: dict[str, str] = {}  # by alias, why what it points to does not answer
        self.num_swaps = self.num_refused = 0

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
            now = registry.aliases(self.name, self.settings)
        except LlavaPipelineError as error:
            self._trouble(self.aliases[0], "the registry cannot be read", error)
            return
        for alias in self.aliases:
            self._follow(alias, now.get(alias))

    def start(self) -> None:
        """Load what the aliases point to; where MLflow is away, what answered last.

        Raises:
            NoSuchRun: the first alias points to nothing.
            LlavaPipelineError: its version cannot be loaded, and no other one is kept.
        """
        self.look()
        if self.main is not None:
            return
        alias = self.aliases[0]
        if (last := bundles.kept(self.name, alias)) is None:
            raise self._why_nothing(alias)
        self._put(alias, self.load(last))
        log.warning("version %s answers, which did so last", last.version)

    def _why_nothing(self, alias: str) -> LlavaPipelineError:
        told = self.problems.get(alias)
        if told is None:
            return NoSuchRun(f"{self.name} has no alias {alias!r}; run the profile first, or name another --alias")
        return TrackingUnavailable(f"{told}; and no version that answered before is kept here")

    def _follow(self, alias: str, version: str | None) -> None:
        old = self.by_alias.get(alias)
        if version is None:
            if alias != self.aliases[0]:
                self._put(alias, None)
            elif old is not None:
                self.problems[alias] = f"{self.name} has no alias {alias} any more"
            return
        if old is not None and old.bundle.version == version:
            self.problems.pop(alias, None)
            return
        if (same := self.named(f"{self.name}-v{version}")) is not None:  # a challenger that was promoted
            self._put(alias, same)
            return
        try:
            self._put(alias, self.load(bundles.fetch(self.name, version, self.settings)))
        except LlavaPipelineError as error:
            self._trouble(alias, f"version {version} does not answer", error)

    def _put(self, alias: str, version: Version | None) -> None:
        """Who asks from now on is answered by this version; who was asking before is answered by the one before."""
        old = self.by_alias.get(alias)
        if version is old:
            return
        changed = {name: one for name, one in self.by_alias.items() if name != alias}
        self.by_alias = changed if version is None else changed | {alias: version}
        self.problems.pop(alias, None)
        if version is not None:
            bundles.keep(alias, version.bundle)
            self.num_swaps += 1
            log.info("%s is version %s of %s", alias, version.bundle.version, self.name)

    def _trouble(self, alias: str, what: str, error: LlavaPipelineError) -> None:
        told = f"{what}: {error}"
        if self.problems.get(alias) != told:
            log.warning("%s: %s", alias, told)
            self.num_refused += 1
        self.problems[alias] = told

    def load(self, bundle: Bundle) -> Version:
        """A version, beside those that answer: its weights checked, and its golden questions asked.

        Raises:
            IncompatibleParts: it was trained between other parts.
            WeightsMismatch, DamagedArtifact: its weights are damaged, or it does not answer as it did.
        """
        bundle.check()
        module = copy.deepcopy(self._llava.model.model.multi_modal_projector)
        module.load_state_dict(projector.load(bundle.projector, self._model), strict=True)
        version = Version(bundle, Loaded(bundle.projector_digest, module))
        self._try_out(version)
        return version

    def _try_out(self, version: Version) -> None:
        """Ask the golden questions; this warms the model too."""
        folder = version.bundle.folder / "golden"
        if not (folder / "questions.json").is_file():
            log.warning("version %s has no golden questions: it is served untried", version.bundle.version)
            return
        for golden in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
            said = self._say(version, folder / golden["picture"], golden["question"])
            if said != golden["answer"]:
                raise DamagedArtifact(
                    f"version {version.bundle.version} answers {said!r} to {golden['question']!r}, not "
                    f"{golden['answer']!r} as when it was evaluated; train again or choose another version"
                )

    def _say(self, version: Version, path: Path, text: str) -> str:
        with Image.open(path) as image:
            picture = picture_of(self._llava.processor.resize(image.convert("RGB")))
        prompt = prompt_of(self._llava.processor, question(text, with_image=True))
        answer: Future[str] = Future()
        pieces: list[str] = []

        def tell(told: Piece | Failed) -> None:
            if isinstance(told, Failed):
                answer.set_exception(DamagedArtifact(f"version {version.bundle.version} does not answer ({told.why})"))
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
                time.sleep(0.05)
                if time.monotonic() > late:
                    raise DamagedArtifact("the server is too busy to try a new version") from None
            except TimeoutError:
                ask.cancelled = True
                raise DamagedArtifact(
                    f"version {version.bundle.version} took more than {GOLDEN_SECONDS:g} s for a golden question"
                ) from None


class Follower:
    """Looks every so many seconds, in a thread of its own."""

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
            try:
                self._look()
            except Exception:
                log.exception("the aliases could not be followed; what answers goes on answering")
