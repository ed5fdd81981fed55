"""Runs that nobody ends any more: their process was killed, and MLflow would show them as running for ever."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING

from llava_pipeline.tracking.client import connect, find_experiment, first_line
from llava_pipeline.tracking.settings import Settings
from llava_pipeline.which_process import began

if TYPE_CHECKING:
    from mlflow.entities import Run

_log = logging.getLogger(__name__)
PROCESS = "llava.process"
REASON = "its process ended without telling"


def this_process() -> str:
    """Host, number and start time: a number alone is given again to another process."""
    return f"{socket.gethostname()}:{os.getpid()}:{began(os.getpid())}"


def sweep_stale(settings: Settings) -> list[str]:
    """End as FAILED every RUNNING run whose process on this host is gone; gives their ids.

    Runs of other hosts, and of processes that live, are left alone. Never raises: a sweep is worth less than a run.
    """
    swept = []
    try:
        client = connect(settings)
        if (experiment := find_experiment(client, settings)) is None:
            return []
        for run in client.search_runs([experiment.experiment_id], filter_string="attributes.status = 'RUNNING'"):
            if left_alone(run):
                client.set_tag(run.info.run_id, "llava.failure", f"{REASON} ({run.data.tags[PROCESS]})")
                client.set_terminated(run.info.run_id, "FAILED")
                swept.append(run.info.run_id)
    except Exception as error:
        _log.warning("runs of dead processes are not swept: %s", first_line(error))
    return swept


def left_alone(run: Run) -> bool:
    """Whether the process that recorded a run has ended."""
    return is_gone(run.data.tags.get(PROCESS, ""))


def is_elsewhere(process: str) -> bool:
    """Whether a process is one of another host, or container, of which nothing can be told here."""
    return process.partition(":")[0] != socket.gethostname()


def is_gone(process: str) -> bool:
    """Whether a process, as ``this_process`` names it, was one of this host and has ended."""
    host, _, rest = process.partition(":")
    number, _, then = rest.partition(":")
    if host != socket.gethostname() or not number.isdecimal():
        return False
    try:
        return began(int(number)) != then
    except ProcessLookupError:
        return True
