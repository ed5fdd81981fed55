"""Processes that outlive the command that starts them, noted below ``<home>/services``.

``<name>.json`` says which process it is, ``<name>.log`` what it says. A process is known by its number and its start
time, for numbers are given again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import requests
from pydantic import ValidationError

from llava_pipeline.errors import NotStarted
from llava_pipeline.spec import Frozen
from llava_pipeline.store import home, write_text
from llava_pipeline.which_process import began

SECONDS_TO_END = 75.0  # a training that is told to stop saves first, and may take a minute
SECONDS_BETWEEN = 0.2
LAST_LINES = 3
MAX_LOG_BYTES = 10_000_000


class Process(Frozen):
    """One that was started."""

    pid: int
    began: str  # as ``which_process`` tells it
    argv: tuple[str, ...]


def folder() -> Path:
    """Where processes are noted, with what they say."""
    return home() / "services"


def log_of(name: str) -> Path:
    """What it has said, all starts one behind the other."""
    return folder() / f"{name}.log"


def start(name: str, argv: list[str], environment: dict[str, str]) -> None:
    """Start a process in a session of its own, so that closing this terminal does not end it."""
    folder().mkdir(parents=True, exist_ok=True)
    if log_of(name).exists() and log_of(name).stat().st_size > MAX_LOG_BYTES:
        log_of(name).replace(log_of(name).with_suffix(".log.old"))
    with log_of(name).open("ab") as log:
        started = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=folder(),
            env=os.environ | environment,
        )  # fmt: skip
    note = Process(pid=started.pid, began=began(started.pid), argv=tuple(argv))
    write_text(_note(name), note.model_dump_json(indent=1) + "\n")


def running(name: str) -> psutil.Process | None:
    """The process that was started under a name, while it lives."""
    try:
        noted = Process.model_validate_json(_note(name).read_text(encoding="utf-8"))
        process = psutil.Process(noted.pid)
        alive = began(noted.pid) == noted.began and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValidationError, psutil.NoSuchProcess):  # ProcessLookupError is an OSError
        return None
    return process if alive else None


def wait_until_ready(name: str, url: str, seconds: float) -> None:
    """Wait for a 200 from an address.

    Raises:
        NotStarted: the process has ended, or does not answer in time; with the last it said.
    """
    deadline = time.monotonic() + seconds
    while not answers(url):
        refuse_if_ended(name)
        if time.monotonic() > deadline:
            raise NotStarted(f"{name} does not answer at {url} after {seconds:g} s; its log is {log_of(name)}")
        time.sleep(SECONDS_BETWEEN)


def refuse_if_ended(name: str) -> None:
    """Say what was its end.

    Raises:
        NotStarted: the process has ended.
    """
    if running(name) is None:
        raise NotStarted(f"{name} has ended right after its start: {last_words(name)}; its log is {log_of(name)}")


def answers(url: str, seconds: float = 5.0) -> bool:
    """Whether an address answers with 200."""
    try:
        return requests.get(url, timeout=seconds).status_code == 200
    except requests.RequestException:
        return False


def is_taken(host: str, port: int) -> bool:
    """Whether something listens there already."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError:
            return True
    return False


def last_words(name: str) -> str:
    """The last lines of a log."""
    try:
        lines = log_of(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return " / ".join(line.strip() for line in lines[-LAST_LINES:]) or "nothing was said"


def stop(names: Iterable[str]) -> list[str]:
    """End processes with all that they have started, one after the other; gives the names of those that ran.

    Each is asked first, and killed when it has not ended in time. What its children have started in sessions of their
    own is ended too.
    """
    ended = []
    for name in names:
        if (process := running(name)) is not None:
            _end(process)
            ended.append(name)
        _note(name).unlink(missing_ok=True)
    return ended


def _end(process: psutil.Process) -> None:
    family = [process, *_descendants(process)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < deadline and _lives(process):
        family += [child for child in _descendants(process) if child not in family]
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(SECONDS_BETWEEN)
    psutil.wait_procs(family, max(0.0, deadline - time.monotonic()))
    for left in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(family, SECONDS_TO_END)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _note(name: str) -> Path:
    return folder() / f"{name}.json"
