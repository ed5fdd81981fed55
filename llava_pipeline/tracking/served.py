"""Which version serving says that it answers with."""

from __future__ import annotations

import time
from typing import Any

import requests

SECONDS_BETWEEN = 1.0
SECONDS_FOR_AN_ANSWER = 10.0


def wait_until_served(url: str, model: str, version: str, seconds: float) -> dict[str, Any] | str:
    """What ``/readyz`` tells once it reports the version, or another registered model.

    Args:
        url: of ``/readyz``.
        model: name of the registered model.
        version: that is waited for.
        seconds: how long.

    Returns:
        Its answer; where the version was not reported in time, a sentence with what was.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            told = requests.get(url, timeout=min(seconds, SECONDS_FOR_AN_ANSWER)).json()
            if isinstance(told, dict) and (
                str(told.get("version")) == version or told.get("model") not in (None, model)
            ):
                return told
            reported = f"version {told.get('version')}" if isinstance(told, dict) else "something that is no object"
        except (requests.RequestException, ValueError) as error:
            reported = type(error).__name__
        if time.monotonic() >= deadline:
            return f"serving at {url} still reported {reported} after {seconds:g} s, not version {version}; see its log"
        time.sleep(min(SECONDS_BETWEEN, max(0.0, deadline - time.monotonic())))
