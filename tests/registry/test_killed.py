"""A promotion that is killed between any two of its steps: some version is served, and repeating it finishes it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import pytest

from llava_pipeline.errors import NotPromoted
from llava_pipeline.tracking import promotion, registry
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.history import history
from llava_pipeline.tracking.settings import Settings
from tests.registry.conftest import NAME, Register
from tests.registry.test_promotion import following, serving

WRITES = (
    "set_registered_model_alias", "delete_registered_model_alias", "set_registered_model_tag", "set_model_version_tag",
)  # fmt: skip
FORK = get_context("fork")  # MLflow takes seconds to import, and the parent has


def promote(settings: Settings) -> None:
    promotion.promote(NAME, "3", "2", settings, who="who", why="why")


def roll_back(settings: Settings) -> None:
    promotion.rollback(NAME, None, settings, who="who", why="why")


def die_at(number: int, before: bool) -> None:
    """Kill this process before or after the write with this number."""
    from mlflow import MlflowClient

    count = 0

    def dying(name: str) -> Callable[..., Any]:
        carry_out = getattr(MlflowClient, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            done = carry_out(*args, **kwargs)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return call

    for name in WRITES:
        setattr(MlflowClient, name, dying(name))


def killed(act: Callable[[Settings], None], settings: Settings, number: int, before: bool) -> bool:
    """Whether the process was killed, and did not come to its end first."""

    def work() -> None:
        die_at(number, before)
        act(settings)

    process = FORK.Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(("act", "old", "new"), [(promote, "2", "3"), (roll_back, "2", "1")])
def test_killed_anywhere_it_is_served_and_repeated_it_is_finished(
    register: Register, settings: Settings, act: Callable[[Settings], None], old: str, new: str
) -> None:
    for _ in range(3):
        register()
    client = connect(settings)
    client.set_model_version_tag(NAME, "1", "llava.promoted_at", "then")
    moments = 0
    for number in range(1, 20):
        for before in (True, False):
            for alias, version in {"champion": "2", "previous": "1", "challenger": "3"}.items():
                client.set_registered_model_alias(NAME, alias, version)
            if not killed(act, settings, number, before):
                assert number > 5
                return
            moments += 1
            found = registry.aliases(NAME, settings)
            assert found["champion"] in (old, new)
            if [event["outcome"] for event in history(NAME, settings)][:1] != ["done"]:  # else nothing is left to do
                act(settings)
            finished = {"champion": new, "previous": old} | ({} if new == "3" else {"challenger": "3"})
            assert registry.aliases(NAME, settings) == finished, (number, before)
            assert all(event["outcome"] != "begun" for event in history(NAME, settings))
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize(("act", "old", "new"), [(promote, "2", "3"), (roll_back, "2", "1")])
def test_killed_anywhere_a_champion_that_serving_does_not_report_is_taken_back(
    register: Register, settings: Settings, act: Callable[[Settings], None], old: str, new: str, follows: bool
) -> None:
    for _ in range(3):
        register()
    client = connect(settings)
    client.set_model_version_tag(NAME, "1", "llava.promoted_at", "then")
    before = {"champion": "2", "previous": "1", "challenger": "3"}
    after = {"champion": new, "previous": old} | ({} if new == "3" else {"challenger": "3"})
    with serving(json.dumps({"version": new if follows else "7"})) as url:
        slow = following(settings, url)
        for number in range(1, 20):
            for alias, version in before.items():
                client.set_registered_model_alias(NAME, alias, version)
            was_killed = killed(act, slow, number, True)
            assert registry.aliases(NAME, settings)["champion"] in (old, new)
            # Whoever comes next sets it right, whatever else is asked.
            with pytest.raises(NotPromoted):
                promotion.delete_version(NAME, old, slow, who="who", why="why")
            assert registry.aliases(NAME, settings) in ((before, after) if follows else (before,)), number
            assert all(event["outcome"] != "begun" for event in history(NAME, settings))
            if not was_killed:
                assert number > 5
                return
    raise AssertionError("it never came to its end")


def test_what_somebody_else_has_moved_meanwhile_is_left_alone(register: Register, settings: Settings) -> None:
    for _ in range(4):
        register()
    client = connect(settings)
    for alias, version in {"champion": "2", "previous": "1", "challenger": "3"}.items():
        client.set_registered_model_alias(NAME, alias, version)
    assert killed(promote, settings, 3, True)
    for alias, version in {"champion": "4", "previous": "2", "challenger": "1"}.items():
        client.set_registered_model_alias(NAME, alias, version)
    with pytest.raises(NotPromoted):
        promotion.delete_version(NAME, "4", settings, who="who", why="why")
    assert registry.aliases(NAME, settings) == {"champion": "4", "previous": "2", "challenger": "1"}
    assert history(NAME, settings)[0]["outcome"].startswith("undone: something else has moved the champion")


def test_of_two_at_once_one_wins_and_the_history_has_both(register: Register, settings: Settings) -> None:
    for _ in range(2):
        register()

    together = FORK.Barrier(2)

    def attempt(version: str) -> None:
        together.wait(60)
        try:
            promotion.promote(NAME, version, None, settings, who=f"process {version}", why="now")
        except NotPromoted:
            os._exit(3)
        os._exit(0)

    both = [FORK.Process(target=attempt, args=(version,)) for version in ("1", "2")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert sorted(process.exitcode or 0 for process in both) == [0, 3]
    winner = "1" if both[0].exitcode == 0 else "2"
    assert registry.aliases(NAME, settings) == {"champion": winner}
    events = history(NAME, settings)
    assert {event["who"] for event in events} == {"process 1", "process 2"}
    assert sorted(event["outcome"].split(":")[0] for event in events) == ["done", "refused"]


def test_a_deletion_that_was_killed_after_it_was_done_is_told_as_done(register: Register, settings: Settings) -> None:
    for _ in range(2):
        register()

    def delete(settings: Settings) -> None:
        promotion.delete_version(NAME, "2", settings, who="who", why="why")

    assert killed(delete, settings, 2, True)  # the first write begins the event, the second one ends it
    promotion.promote(NAME, "1", None, settings, who="who", why="why")
    promoted, deleted = history(NAME, settings)
    assert (promoted["action"], promoted["outcome"]) == ("promote", "done")
    assert (deleted["action"], deleted["outcome"]) == ("delete", "took effect; its process was killed")
