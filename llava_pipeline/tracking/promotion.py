"""The alias ``champion`` moves: after the gate, by a person, or back. In every instant some version is served.

MLflow has no compare-and-set, so a lock file keeps other processes of this machine out while the champion is compared
with the one the decision was made against. The event is written first and ``previous`` before ``champion``: a process
that dies in between leaves the old champion in place or the new one, and whoever comes next sets the rest right.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from llava_pipeline.errors import NoSuchRun, NotPromoted
from llava_pipeline.spec import Frozen
from llava_pipeline.tracking import history, registry
from llava_pipeline.tracking.client import connect, locked, refusals
from llava_pipeline.tracking.served import wait_until_served
from llava_pipeline.tracking.settings import Settings, ready_url_of
from llava_pipeline.tracking.verdict import NONE

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)
Action = Literal["promote", "rollback"]


class Moved(Frozen):
    """What a promotion or a rollback did."""

    registered_model: str
    action: Action
    champion: str
    previous: str | None
    was: str | None  # the champion before
    changed: bool  # False: it was champion already


def promote(name: str, version: str, expected_champion: str | None, settings: Settings, *, who: str, why: str) -> Moved:
    """Make a version the champion, and the champion of now the previous one. Repeated, it changes nothing.

    Raises:
        NoSuchRun: there is no such version.
        NotPromoted: the champion is not ``expected_champion`` any more, or serving did not follow.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    with _alone(name, f"promote version {version} of {name}", settings) as (client, _):
        registry.require_version(client, name, version)
        champion = _champion(client, name, settings)
        if champion == version:
            return _moved(client, name, "promote", champion, settings, changed=False)
        if champion != expected_champion:
            told = (
                f"the champion of {name} is {_version(champion)}, but version {version} was compared with "
                f"{_version(expected_champion)}; judge it again: `llava-pipeline gate {version} "
                f"{_profile(name)}`"
            )
            before = registry.aliases_of(client, name)
            history.write(client, name, "promote", version, before, champion, who, why, f"refused: {told}")
            raise NotPromoted(told)
        return _move(client, name, "promote", version, settings, who, why)


def promote_by_person(
    name: str, version: str, settings: Settings, *, who: str, why: str, despite_gate: bool = False
) -> Moved:
    """Promote what the gate has passed; its files are checked first.

    Raises:
        NoSuchRun: there is no such version.
        NotPromoted: the gate refused it or was not asked, and ``despite_gate`` is not set; or see ``promote``.
        DamagedArtifact: its files are not those that were recorded.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    with refusals(f"read version {version} of {name}"):
        client = connect(settings)
        tags = registry.require_version(client, name, version).tags
        now = _champion(client, name, settings)
    seen = tags.get("llava.gate.champion")
    expected = None if seen == NONE else seen
    if tags.get("llava.gate") != "passed" or seen is None:
        if not despite_gate:
            raise NotPromoted(f"{_why_not(name, version, tags)}, or promote it with --despite-gate")
        why, expected = f"{why} (despite the gate)", now
    registry.download_projector(version, name, settings)
    return promote(name, version, expected, settings, who=who, why=why)


def rollback(name: str, version: str | None, settings: Settings, *, who: str, why: str) -> Moved:
    """Make a former champion the champion again: ``version``, or the previous one. Its files are checked first.

    Without a version, repeated after it was killed behind its last step, it does not go forth again.

    Raises:
        NoSuchRun: there is no such version, or nothing to go back to.
        NotPromoted: ``version`` was never champion, or serving did not follow.
        DamagedArtifact: its files are not those that were recorded.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    names = settings.registry
    with _alone(name, f"roll {name} back", settings) as (client, finished):
        found = registry.aliases_of(client, name)
        target = version or found.get(names.previous)
        if target is None or names.champion not in found:
            raise NoSuchRun(f"{name} has nothing to go back to; {registry.what_exists(client, name)}")
        tags = registry.require_version(client, name, target).tags
        if target == found[names.champion] or (version is None and "rollback" in finished):
            return _moved(client, name, "rollback", target, settings, changed=False)
        if "llava.promoted_at" not in tags:
            raise NotPromoted(
                f"version {target} of {name} was never champion; make it that with `llava-pipeline promote {target} "
                f"{_profile(name)} --reason ...`"
            )
        registry.download_projector(target, name, settings)
        return _move(client, name, "rollback", target, settings, who, why)


def delete_version(name: str, version: str, settings: Settings, *, who: str, why: str) -> None:
    """Delete a version that no alias points to; its run stays.

    Raises:
        NoSuchRun: there is no such version.
        NotPromoted: an alias points to it.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    with _alone(name, f"delete version {version} of {name}", settings) as (client, _):
        registry.require_version(client, name, version)
        before = registry.aliases_of(client, name)
        carried = sorted(alias for alias, at in before.items() if at == version)
        if carried:
            raise NotPromoted(
                f"version {version} of {name} is {' and '.join(carried)}, and MLflow would delete the alias with it; "
                "promote or roll back to another version first"
            )
        event = history.write(client, name, "delete", version, before, None, who, why)
        client.delete_model_version(name, version)
        history.end(client, name, event, history.DONE)


# --------------------------------------------------------------------------------------------- the move itself


def _move(
    client: MlflowClient, name: str, action: Action, version: str, settings: Settings, who: str, why: str
) -> Moved:
    """Move the aliases, in an order that is served and consistent wherever it is cut off."""
    names = settings.registry
    before = registry.aliases_of(client, name)
    was = before.get(names.champion)
    event = history.write(client, name, action, version, before, was, who, why)
    if was is not None:
        client.set_registered_model_alias(name, names.previous, was)
    client.set_registered_model_alias(name, names.champion, version)
    if before.get(names.challenger) == version:
        client.delete_registered_model_alias(name, names.challenger)
    found = _champion(client, name, settings)
    problem: str | None = None
    if found != version:
        problem = f"{_version(found)} is champion right after: something else moves the alias; stop it"
        history.end(client, name, event, f"lost: {problem}")
    # The first champion is waited for by nobody: serving begins with it, and takes its time.
    elif was is not None and (problem := wait_for_serving(name, version, settings)) is not None:
        _put_back(client, name, before, settings)
        history.end(client, name, event, f"undone: {problem}")
    if problem is not None:
        raise NotPromoted(f"version {version} of {name} did not become champion: {problem}; then try again")
    _mark(client, name, version, was, who)
    history.end(client, name, event, history.DONE)
    return _moved(client, name, action, was, settings, changed=True)


def _mark(client: MlflowClient, name: str, version: str, was: str | None, who: str) -> None:
    """Note on a version that it became champion: last, for what is taken back never was one."""
    tags = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "over": was or NONE, "by": who[: history.MAX_TEXT]}
    for key, value in tags.items():
        client.set_model_version_tag(name, version, f"llava.promoted_{key}", value)


def _put_back(client: MlflowClient, name: str, before: dict[str, str], settings: Settings) -> None:
    """The aliases as they were, the champion first; a challenger that was registered since stays."""
    names = settings.registry
    now = registry.aliases_of(client, name)
    for alias in (names.champion, names.previous, names.challenger):
        if alias in before and not (alias == names.challenger and alias in now):
            client.set_registered_model_alias(name, alias, before[alias])
        elif alias in now and alias != names.challenger:
            client.delete_registered_model_alias(name, alias)


def wait_for_serving(name: str, version: str, settings: Settings) -> str | None:
    """Wait until serving reports the version; what went wrong, or None.

    At once where no serving is configured, or where it answers with another registered model.
    """
    if (url := ready_url_of(name, settings)) is None:
        return None
    told = wait_until_served(url, name, version, settings.serving.timeout_seconds)
    if isinstance(told, str):
        return told
    if told.get("model", name) != name:
        _log.info("serving at %s answers with %s, so nobody waits for it", url, told["model"])
    return None


@contextmanager
def _alone(name: str, attempt: str, settings: Settings) -> Iterator[tuple[MlflowClient, set[str]]]:
    """A client, while no other process of this machine moves this model's aliases.

    With it, which actions a process that was killed had carried out unseen.
    """
    with locked(name), refusals(attempt):
        client = connect(settings)
        if registry.registered_model(client, name) is None:
            raise NoSuchRun(f"nothing is registered as {name}; run the profile first")
        yield client, _set_right(client, name, settings)


def _set_right(client: MlflowClient, name: str, settings: Settings) -> set[str]:
    """Finish, or take back, what processes that were killed had begun; the lock says that they are not at work.

    Gives the actions that had taken effect.
    """
    finished = set()
    for key, event in history.unfinished(client, name).items():
        problem = _finish_or_undo(client, name, event, settings)
        told = "took effect" if problem is None else f"undone: {problem}"
        history.end(client, name, key, f"{told}; its process was killed")
        if problem is None:
            finished.add(str(event["action"]))
    return finished


def _finish_or_undo(client: MlflowClient, name: str, event: dict[str, Any], settings: Settings) -> str | None:
    """Do what is left of an event, or take it back; why it was taken back, or None.

    A champion that serving never confirmed is not one because its process was killed while it waited.
    """
    names, version, before = settings.registry, event["to"], event["before"]
    if event["action"] == "delete":
        left = client.search_model_versions(f"name = '{name}' and version_number = '{version}'")
        return "nothing was deleted yet" if left else None
    now = _champion(client, name, settings)
    if now not in (version, before.get(names.champion)):
        return "something else has moved the champion since"
    if now != version:
        problem: str | None = "the champion had not moved yet"
    else:
        problem = wait_for_serving(name, version, settings) if names.champion in before else None
    if problem is not None:
        _put_back(client, name, before, settings)
        return problem
    if names.champion in before:
        client.set_registered_model_alias(name, names.previous, before[names.champion])
    if registry.aliases_of(client, name).get(names.challenger) == version:
        client.delete_registered_model_alias(name, names.challenger)
    _mark(client, name, version, before.get(names.champion), str(event["who"]))
    return None


def _moved(
    client: MlflowClient, name: str, action: Action, was: str | None, settings: Settings, *, changed: bool
) -> Moved:
    found, names = registry.aliases_of(client, name), settings.registry
    return Moved(
        registered_model=name, action=action, champion=found[names.champion], previous=found.get(names.previous),
        was=was, changed=changed,
    )  # fmt: skip


def _champion(client: MlflowClient, name: str, settings: Settings) -> str | None:
    return registry.aliases_of(client, name).get(settings.registry.champion)


def _why_not(name: str, version: str, tags: dict[str, str]) -> str:
    """Which rules of the gate a version failed, and what to do."""
    again = f"judge it with `llava-pipeline gate {version} {_profile(name)}`"
    failed = [
        f"{key.removeprefix('llava.gate.')} ({value.removeprefix('refused: ')})"
        for key, value in sorted(tags.items())
        if key.startswith("llava.gate.") and value.startswith("refused")
    ]
    if not failed:
        return f"the gate was not asked about version {version} of {name}; {again}"
    return f"the gate refused version {version} of {name}: {'; '.join(failed)}; mend that and train again"


def _profile(name: str) -> str:
    return f"--profile {name.removeprefix('llava-projector-')}"


def _version(version: str | None) -> str:
    return "none" if version is None else f"version {version}"
