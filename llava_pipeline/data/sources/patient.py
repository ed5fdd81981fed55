"""Requests to the hub about a data set, asked again until they are answered or patience ends.

huggingface_hub asks again by itself, but five times and as late as the hub says, gives up on nothing that drips, and a
body that ends early is not its concern; and ``datasets`` asks again around it, for minutes. So both get a client from
here, by the hook that huggingface_hub has for it: a request about a data set that somebody is patient for either comes
back whole or ends in ``SourceUnavailable``, which neither of them takes for an error that may pass. Every other request
goes through as before.
"""

from __future__ import annotations

import logging
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from huggingface_hub import errors, get_session, set_client_factory

from llava_pipeline.errors import SourceUnavailable

logger = logging.getLogger(__name__)
SILENT_SECONDS = 10.0  # a hub that says nothing for so long is not there
SLOWEST = 1024  # bytes per second, over at least SILENT_SECONDS: below, the connection is as good as silent
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
PASSING_STATUS = (408, 429, 500, 502, 503, 504)

# httpx or httpx2, by the version of huggingface_hub.
_http: Any = sys.modules[errors.HTTPError.__module__.partition(".")[0]]  # type: ignore[attr-defined]
HTTPError: type[Exception] = _http.HTTPError
_patience: dict[str, float] = {}
_lock = threading.Lock()
_about = re.compile(r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/|$)")


def be_patient(repo_id: str, seconds: float) -> None:
    """From now on, wait so long for every answer about a data set. Not for each other: the last word counts."""
    with _lock:
        if not isinstance(get_session(), _Client):
            set_client_factory(_client)
        _patience[repo_id] = seconds


def remedy(repo_id: str, words: str) -> str:
    """What was found, and what to do about it."""
    return (
        f"cannot read the data set {repo_id} ({words}); connect to the hub, or read local Parquet files with "
        "--set 'data.source={kind: parquet, path: FOLDER}', or train on --set data.source=scenes"
    )


class Patience:
    """How long something is tried again; begins with the first failure and anew with every progress."""

    def __init__(self, repo_id: str, seconds: float):
        self.repo_id, self.seconds = repo_id, seconds
        self.progress()

    def progress(self) -> None:
        """Something came through."""
        self._deadline: float | None = None
        self._pause = FIRST_PAUSE

    def wait(self, what: str, words: str, asked: float = 0.0) -> None:
        """Pause before the next try: what the hub asks for, else longer each time and never quite the same.

        Raises:
            SourceUnavailable: the pause would go beyond patience.
        """
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self.seconds
        # Workers that were cut off together should not come back together.
        pause = max(asked, self._pause * random.uniform(0.5, 1.0))
        if now + pause > self._deadline:
            wish = f", which asks to wait {asked:g} s" if asked else ""
            told = f"{what}: {words}{wish}; asked for {self.seconds:g} s, which data.patience_seconds sets"
            raise SourceUnavailable(remedy(self.repo_id, told))
        logger.warning("%s of %s did not come (%s); asking again in %.1f s", what, self.repo_id, words, pause)
        time.sleep(pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


class _Failed(Exception):
    """An answer that is none, with the seconds the hub asks to wait."""

    def __init__(self, words: str, asked: float = 0.0):
        super().__init__(words)
        self.asked = asked


class _Client(_http.Client):  # type: ignore[misc]
    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """One answer, whole; ``stream`` leaves its body to be read, which then ends in an error when it stalls."""
        match = _about.match(request.url.path)
        if match is None or match[1] not in _patience:
            return super().send(request, stream=stream, **options)
        # huggingface_hub gives some requests no time limit and others 100 s.
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), SILENT_SECONDS)
        patience = Patience(match[1], _patience[match[1]])
        while True:
            try:
                return self._send_once(request, stream, options)
            except errors.OfflineModeIsEnabled as error:
                raise SourceUnavailable(remedy(match[1], "HF_HUB_OFFLINE is set; unset it")) from error
            except (_Failed, HTTPError) as error:
                patience.wait(request.url.path.rsplit("/", 1)[-1], first_words(error), getattr(error, "asked", 0.0))

    def _send_once(self, request: Any, stream: bool, options: dict[str, Any]) -> Any:
        response = super().send(request, stream=True, **options)
        try:
            if response.status_code in PASSING_STATUS:
                raise _Failed(f"the hub answers with status {response.status_code}", _seconds_asked(response.headers))
            response.stream = _Paced(response.stream)
            if not stream:
                response.read()
                _check_length(request, response)
        except BaseException:
            response.close()
            raise
        return response


class _Paced(_http.SyncByteStream):  # type: ignore[misc]
    """A body that may take its time, but not drip for ever."""

    def __init__(self, body: Any):
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        parts, received, waited = iter(self._body), 0, 0.0
        while True:
            began = time.monotonic()
            part = next(parts, None)
            waited += time.monotonic() - began  # without what the reader does in between
            if part is None:
                return
            received += len(part)
            if waited > SILENT_SECONDS and received < waited * SLOWEST:
                raise _http.ReadTimeout(f"{received} bytes in {waited:.0f} s")
            yield part

    def close(self) -> None:
        self._body.close()


def _client() -> _Client:
    """As huggingface_hub makes its own; the hook is where it looks whether it is offline."""
    return _Client(event_hooks=_hooks, follow_redirects=True, timeout=None)


_hooks = get_session().event_hooks


def _check_length(request: Any, response: Any) -> None:
    """A part of a file that is shorter than was asked for claims to be whole."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    total = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("content-range", ""))
    if response.status_code != 206 or not asked or not total:
        return
    expected = min(int(asked[2]) + 1, int(total[1])) - int(asked[1])
    if len(response.content) != expected:
        raise _Failed(f"{len(response.content)} bytes where {expected} were asked for")


def _seconds_asked(headers: Any) -> float:
    """What ``Retry-After`` or the hub's own ``RateLimit: "api";r=0;t=55`` says; 0 where nothing does."""
    after = headers.get("retry-after", "").strip()
    if after.isdigit():
        return float(after)
    rate = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return float(rate[1]) if rate else 0.0


def first_words(error: BaseException) -> str:
    """The first line of an error, or its name where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
