"""Any order of commands on a real registry, cut off anywhere: a plain model says what must have come of it."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as how
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llava_pipeline import store
from llava_pipeline.contracts import Evaluation
from llava_pipeline.errors import NoSuchRun, NotPromoted
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import promotion, registry
from llava_pipeline.tracking.client import connect, ensure_experiment
from llava_pipeline.tracking.history import history
from llava_pipeline.tracking.settings import Settings
from tests.registry.conftest import NAME, Register
from tests.registry.test_killed import WRITES
from tests.registry.test_promotion import following
from tests.tracking.conftest import build_evaluation, spec

__all__ = ["spec"]

NONE = "none"
ALL_WRITES = (*WRITES, "delete_model_version")
LAST = 12  # no command writes more often
Aliases = dict[str, str]
Error = type[Exception] | None
counted = itertools.count(1)


class CutOff(BaseException):
    """In place of a kill: nothing catches it."""


@contextmanager
def cut_off(number: int, before: bool) -> Iterator[None]:
    """Let the write with this number, before or after it is carried out, be the last thing that happens."""
    from mlflow import MlflowClient

    count = itertools.count(1)

    def last(name: str) -> Callable[..., Any]:
        carry_out = getattr(MlflowClient, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            now = next(count)
            if now == number and before:
                raise CutOff
            done = carry_out(*args, **kwargs)
            if now == number:
                raise CutOff
            return done

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ALL_WRITES:
            patch.setattr(MlflowClient, name, last(name))
        yield


# --------------------------------------------------------------------------------------------- the model


@dataclass
class Version:
    gate: str
    seen: str  # the champion that the gate compared it with
    was_champion: bool = False
    legitimate: bool = False  # passed the gate against the champion it replaced, or a person insisted
    deleted: bool = False


@dataclass
class Event:
    action: str
    source: str | None
    to: str
    who: str
    outcome: str = "done"


@dataclass
class Model:
    """What the documentation promises."""

    versions: dict[str, Version] = field(default_factory=dict)
    aliases: Aliases = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    pending: Aliases | None = None  # the aliases before the newest event, whose process was cut off

    @property
    def champion(self) -> str | None:
        return self.aliases.get("champion")

    def exists(self, version: str) -> bool:
        return version in self.versions and not self.versions[version].deleted

    def settle(self) -> set[str]:
        """What the next command does first: finish what was cut off, or take it back. Gives what took effect."""
        if self.pending is None:
            return set()
        event, before = self.events[-1], self.pending
        self.pending = None
        if event.action == "delete":
            took_effect = self.versions[event.to].deleted
        else:
            took_effect = self.champion == event.to
            if took_effect:
                self._become(event.to, before)
            else:  # a challenger that was registered since stays
                since = {"challenger": self.aliases["challenger"]} if "challenger" in self.aliases else {}
                self.aliases = before | since
        event.outcome = "took effect" if took_effect else "undone"
        return {event.action} if took_effect else set()

    def _become(self, version: str, before: Aliases) -> None:
        self.versions[version].was_champion = True
        self.aliases["champion"] = version
        if "champion" in before:
            self.aliases["previous"] = before["champion"]
        if self.aliases.get("challenger") == version:
            del self.aliases["challenger"]

    def _move(self, action: str, version: str, who: str) -> Error:
        self.events.append(Event(action, self.champion, version, who))
        self._become(version, dict(self.aliases))
        return None

    def promote(self, version: str, expected: str | None, who: str) -> Error:
        self.settle()
        if not self.exists(version):
            return NoSuchRun
        if self.champion == version:
            return None
        if self.champion != expected:
            self.events.append(Event("promote", self.champion, version, who, "refused"))
            return NotPromoted
        self.versions[version].legitimate = True
        return self._move("promote", version, who)

    def promote_by_person(self, version: str, who: str, despite_gate: bool) -> Error:
        """A verdict against another champion is no verdict, and no word of a person makes it one."""
        if not self.exists(version):
            return NoSuchRun
        found = self.versions[version]
        if found.gate == "passed":
            return self.promote(version, None if found.seen == NONE else found.seen, who)
        return self.promote(version, self.champion, who) if despite_gate else NotPromoted

    def rollback(self, version: str | None, who: str) -> Error:
        finished = self.settle()
        target = version or self.aliases.get("previous")
        if target is None or self.champion is None or not self.exists(target):
            return NoSuchRun
        if target == self.champion or (version is None and "rollback" in finished):
            return None
        return self._move("rollback", target, who) if self.versions[target].was_champion else NotPromoted

    def delete(self, version: str, who: str) -> Error:
        self.settle()
        if not self.exists(version):
            return NoSuchRun
        if version in self.aliases.values():
            return NotPromoted
        self.events.append(Event("delete", None, version, who))
        self.versions[version].deleted = True
        return None


# --------------------------------------------------------------------------------------------- the machine

picks = st.integers(0, 5)
cuts = st.none() | st.tuples(st.integers(1, LAST), st.booleans())


class Machine(RuleBasedStateMachine):
    """Each example has a registered model of its own in one database."""

    def __init__(self, spec: RunSpec, evaluation: Evaluation, folder: Path):
        super().__init__()
        self.spec = spec.model_copy(update={"profile": f"tiny-{next(counted)}"})
        self.name, self.evaluation, self.folder = self.spec.registered_model, evaluation, folder
        self.settings, self.model, self.calls = Settings(), Model(), itertools.count(1)
        self.client = connect(self.settings)

    def pick(self, number: int) -> str:
        """A version, the newest ones first; rarely one that never was."""
        known = [*reversed(self.model.versions), "99"]
        return known[number % len(known)]

    # What commands do, cut off or not.

    def command(
        self, act: Callable[[str], Any], expect: Callable[[Model, str], Error], cut: tuple[int, bool] | None
    ) -> None:
        """Carry out a command and its counterpart in the model; where it was cut off, find out how far it came."""
        who = f"call {next(self.calls)}"
        before, after = self.model, copy.deepcopy(self.model)
        error = expect(after, who)
        try:
            with cut_off(*cut) if cut else cut_off(0, True):
                act(who)
        except CutOff:
            self.find_out(before, after, who)
        except (NoSuchRun, NotPromoted) as refused:
            if type(refused) is not error:
                raise
            assert registry.aliases(self.name, self.settings).get("champion") == before.champion
            self.model = after
        else:
            assert error is None, f"it was to raise {error}"
            self.model = after

    def find_out(self, before: Model, after: Model, who: str) -> None:
        """The champion is the old one or the new one, and whoever looks can tell what is left to do."""
        found, events = registry.aliases(self.name, self.settings), history(self.name, self.settings)[::-1]
        settled = copy.deepcopy(before)
        settled.settle()
        assert found.get("champion") in {settled.champion, after.champion}
        own = bool(events) and events[-1]["who"] == who
        if own and events[-1]["outcome"] != "begun":  # cut off when all was done
            self.model = after
        elif own:
            self.model, moved = settled, found.get("champion") == after.champion != settled.champion
            self.model.pending = dict(settled.aliases)
            self.model.events.append(copy.copy(after.events[-1]))
            self.model.events[-1].outcome = "begun"
            self.model.aliases = found
            to = after.events[-1].to
            if moved:
                self.model.versions[to] = after.versions[to]
            left = self.client.search_model_versions(f"name = '{self.name}' and version_number = '{to}'")
            self.model.versions[to].deleted = not left
            assert left or after.versions[to].deleted
        elif before.pending is not None and events[-1]["outcome"] == "begun":  # cut off while it set things right
            assert found.get("champion") == before.champion
            self.model.aliases = found
        else:
            self.model = settled

    # The rules.

    @initialize()
    def two_champions_and_a_challenger(self) -> None:
        for version in ("1", "2", "3"):
            self.register("passed", now=True)
            if version != "3":
                self.promote_after_the_gate(0, judged_again=False, cut=None)

    @rule(gate=st.sampled_from(["passed", "refused"]), now=st.booleans())
    def register(self, gate: str, now: bool) -> None:
        """A run registers a version, and the gate judges it against the champion of now, or of earlier."""
        run = self.client.create_run(
            ensure_experiment(self.client, self.settings),
            tags={"llava.projector_digest": store.digest_of(store.describe(self.folder))},
        )
        self.client.log_artifacts(run.info.run_id, str(self.folder), "projector")
        version = registry.register(self.client, self.spec, self.evaluation, run.info.run_id, self.settings)
        assert version not in self.model.versions
        self.model.versions[version] = Version("", NONE)
        self.model.aliases["challenger"] = version
        self._judge(version, gate, now)

    def _judge(self, version: str, gate: str, now: bool) -> None:
        earlier = [event.to for event in self.model.events if event.to != self.model.champion]
        seen = (self.model.champion or NONE) if now else (earlier[0] if earlier else "98")
        self.client.set_model_version_tag(self.name, version, "llava.gate", gate)
        self.client.set_model_version_tag(self.name, version, "llava.gate.champion", seen)
        self.model.versions[version].gate, self.model.versions[version].seen = gate, seen

    @rule(number=picks, judged_again=st.booleans(), cut=cuts)
    def promote_after_the_gate(self, number: int, judged_again: bool, cut: tuple[int, bool] | None) -> None:
        """As the flow does: what passed, with the champion that the gate saw."""
        version = self.pick(number)
        if judged_again and self.model.exists(version):
            self._judge(version, "passed", now=True)
        if not self.model.exists(version) or self.model.versions[version].gate != "passed":
            return
        seen = self.model.versions[version].seen
        expected = None if seen == NONE else seen
        self.command(
            lambda who: promotion.promote(self.name, version, expected, self.settings, who=who, why="the gate"),
            lambda model, who: model.promote(version, expected, who),
            cut,
        )

    @rule(number=picks, despite_gate=st.booleans(), cut=cuts)
    def promote_by_a_person(self, number: int, despite_gate: bool, cut: tuple[int, bool] | None) -> None:
        version = self.pick(number)
        self.command(
            lambda who: promotion.promote_by_person(
                self.name, version, self.settings, who=who, why="a person", despite_gate=despite_gate
            ),
            lambda model, who: model.promote_by_person(version, who, despite_gate),
            cut,
        )

    @rule(cut=cuts)
    def roll_back(self, cut: tuple[int, bool] | None) -> None:
        self._roll_back(None, cut)

    @rule(number=picks, cut=cuts)
    def roll_back_to(self, number: int, cut: tuple[int, bool] | None) -> None:
        """To a version of a recent event, or another one."""
        events = [event.to for event in reversed(self.model.events)]
        version = [*dict.fromkeys(events), self.pick(number)][number % (len(set(events)) + 1)]
        self._roll_back(version, cut)

    def _roll_back(self, version: str | None, cut: tuple[int, bool] | None) -> None:
        self.command(
            lambda who: promotion.rollback(self.name, version, self.settings, who=who, why="back"),
            lambda model, who: model.rollback(version, who),
            cut,
        )

    @precondition(lambda self: sum(map(self.model.exists, self.model.versions)) > 3)
    @rule(number=picks, cut=cuts)
    def delete(self, number: int, cut: tuple[int, bool] | None) -> None:
        version = self.pick(number)
        self.command(
            lambda who: promotion.delete_version(self.name, version, self.settings, who=who, why="old"),
            lambda model, who: model.delete(version, who),
            cut,
        )

    # What always holds.

    @invariant()
    def aliases_are_as_they_must_be(self) -> None:
        found = registry.aliases(self.name, self.settings)
        assert found == self.model.aliases
        there = {str(one.version) for one in self.client.search_model_versions(f"name = '{self.name}'")}
        assert there == {version for version in self.model.versions if self.model.exists(version)}
        assert set(found.values()) <= there
        if "champion" in found:
            assert self.model.versions[found["champion"]].legitimate
        if "previous" in found and self.model.pending is None:
            assert found["previous"] != found["champion"]

    @invariant()
    def the_history_has_what_happened_and_nothing_else(self) -> None:
        found = [
            tuple(event[key] for key in ("action", "from", "to", "who")) + tuple(re.split("[:;]", event["outcome"])[:1])
            for event in history(self.name, self.settings)[::-1]
        ]
        assert found == [(e.action, e.source, e.to, e.who, e.outcome) for e in self.model.events]
        assert [event.outcome for event in self.model.events].count("begun") == (self.model.pending is not None)


def run(spec: RunSpec, tmp_path: Path, examples: int, steps: int, phases: tuple[Phase, ...]) -> None:
    folder = tmp_path / "projector"
    folder.mkdir()
    (folder / "projector.safetensors").write_bytes(b"weights")
    evaluation = build_evaluation()
    run_state_machine_as_test(
        lambda: Machine(spec, evaluation, folder),
        settings=how(
            max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, database=None,
            phases=phases, suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_in_any_order_the_champion_is_one_that_may_be_and_the_history_tells_all(
    spec: RunSpec, settings: Settings, tmp_path: Path
) -> None:
    run(spec, tmp_path, examples=10, steps=12, phases=(Phase.generate,))  # making a failure shorter takes minutes


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_in_many_orders_too(spec: RunSpec, settings: Settings, tmp_path: Path) -> None:
    run(spec, tmp_path, examples=80, steps=30, phases=(Phase.generate, Phase.shrink))


def test_a_version_whose_promotion_was_cut_off_is_no_former_champion(register: Register, settings: Settings) -> None:
    for _ in range(2):
        register()
    promotion.promote(NAME, "1", None, settings, who="who", why="why")
    with pytest.raises(CutOff), cut_off(3, True):  # the next write would have moved the champion
        promotion.promote(NAME, "2", "1", settings, who="who", why="why")
    assert registry.aliases(NAME, settings)["champion"] == "1"
    with pytest.raises(NotPromoted, match="was never champion"):
        promotion.rollback(NAME, "2", settings, who="who", why="why")
    assert "llava.promoted_at" not in connect(settings).get_model_version(NAME, "2").tags


def test_a_version_that_serving_did_not_follow_is_no_former_champion(register: Register, settings: Settings) -> None:
    for _ in range(2):
        register()
    promotion.promote(NAME, "1", None, settings, who="who", why="why")
    with pytest.raises(NotPromoted, match="serving at"):
        promotion.promote(NAME, "2", "1", following(settings, "http://127.0.0.1:9/readyz"), who="who", why="why")
    with pytest.raises(NotPromoted, match="was never champion"):
        promotion.rollback(NAME, "2", settings, who="who", why="why")
    assert "llava.promoted_at" not in connect(settings).get_model_version(NAME, "2").tags
