"""Who moved the champion, when, why, from where to where: kept with the registered model, so no version takes it along.

One tag per event, ``llava.event.<UTC time>-<random>``, with JSON as its value. An event is written before anything
moves and told its outcome afterwards, so a process that was killed in between has left a trace.
"""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from llava_pipeline.tracking.client import connect, refusals
from llava_pipeline.tracking.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

PREFIX = "llava.event."
BEGUN, DONE = "begun", "done"
MAX_TEXT = 1000  # of a reason, so that MLflow takes the whole


def write(
    client: MlflowClient,
    name: str,
    action: str,
    version: str,
    before: dict[str, str],
    champion: str | None,
    who: str,
    why: str,
    outcome: str = BEGUN,
) -> str:
    """Write an event down, before anything is done or where nothing will be; returns its key.

    Args:
        client: of the registry.
        name: of the registered model.
        action: promote, rollback or delete.
        version: that is promoted, gone back to or deleted.
        before: every alias with its version, so that they can be put back.
        champion: who was champion; None where nobody was, or it does not matter.
        who: whose word it is.
        why: the reason.
        outcome: what came of it, where that is known already.
    """
    key = f"{PREFIX}{datetime.now(UTC):%Y%m%dT%H%M%S.%f}Z-{secrets.token_hex(4)}"
    event = {"action": action, "from": champion, "to": version, "before": before, "outcome": outcome[:MAX_TEXT]}
    told = {"who": who[:MAX_TEXT], "why": why[:MAX_TEXT]}
    client.set_registered_model_tag(name, key, json.dumps(event | told))
    return key


def end(client: MlflowClient, name: str, key: str, outcome: str) -> None:
    """Tell an event's outcome."""
    event = json.loads(client.get_registered_model(name).tags[key])
    client.set_registered_model_tag(name, key, json.dumps(event | {"outcome": outcome[:MAX_TEXT]}))


def unfinished(client: MlflowClient, name: str) -> dict[str, dict[str, Any]]:
    """Events without an outcome, by key, the oldest first: of processes that were killed, or are still at work."""
    events = _events(client, name)
    return {key: events[key] for key in sorted(events) if events[key].get("outcome") == BEGUN}


def history(name: str, settings: Settings) -> list[dict[str, Any]]:
    """Every event of a registered model, the newest first; empty where there is none.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    from llava_pipeline.tracking.registry import registered_model

    with refusals(f"read the history of {name}"):
        client = connect(settings)
        if registered_model(client, name) is None:
            return []
        events = _events(client, name)
    return [{"when": _time(key), **event} for key, event in sorted(events.items(), reverse=True)]


def _events(client: MlflowClient, name: str) -> dict[str, dict[str, Any]]:
    tags = client.get_registered_model(name).tags
    return {key: _read(value) for key, value in tags.items() if key.startswith(PREFIX)}


def _read(value: str) -> dict[str, Any]:
    """An event; one that somebody else wrote is shown as it is."""
    try:
        event = json.loads(value)
    except ValueError:
        event = None
    return event if isinstance(event, dict) else {"action": "unreadable", "why": value, "outcome": "unreadable"}


def _time(key: str) -> str:
    stamp = key.removeprefix(PREFIX).rsplit("-", 1)[0]
    try:
        return datetime.strptime(stamp, "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC).isoformat(timespec="seconds")
    except ValueError:
        return stamp
