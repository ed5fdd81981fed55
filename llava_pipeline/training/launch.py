"""Start a training as processes of its own, follow what it tells, and leave none of them behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_pipeline import errors
from llava_pipeline.errors import LlavaPipelineError, TrainerDied

SECONDS_TO_SAVE = 60.0
Event = dict[str, Any]
MODULE = "llava_pipeline.training"


def launch(job: Path, out: Path, num_processes: int, follow: Callable[[Event], None]) -> None:
    """Run a job to its end; every event is given to ``follow``.

    One process is started as it is, several by torchrun. Whatever ends this call ends them: they are asked to save and
    stop, and killed if they do not.

    Raises:
        LlavaPipelineError: what the training raised.
        TrainerDied: it was killed, or crashed.
    """
    command = [sys.executable, "-u", "-m", MODULE, str(job), str(out)]
    if num_processes > 1:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), "-m", MODULE]
        command = [sys.executable, "-u", "-m", *torchrun, str(job), str(out)]
    told: list[Event] = []
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, text=True, errors="replace",
            start_new_session=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        try:
            for line in process.stdout or ():
                if (event := parse(line)) is not None:
                    told.append(event) if event["event"] == "error" else follow(event)
            process.wait()
        finally:
            end(process)
        if process.returncode == 0:
            return
        complaints.seek(0)
        raise failure(told, process.returncode, complaints.read())


def parse(line: str) -> Event | None:
    """An event, or None for what a library printed."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def end(process: subprocess.Popen[str]) -> None:
    """Ask the whole group to stop, and kill it when it does not."""
    if process.stdout:
        process.stdout.close()  # one that waits until somebody reads what it tells would never hear of it
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_SAVE)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def failure(told: list[Event], code: int, complaints: str) -> LlavaPipelineError:
    """The error that a training ended with."""
    for event in told:
        kind = getattr(errors, str(event.get("kind")), None)
        if isinstance(kind, type) and issubclass(kind, LlavaPipelineError):
            return kind(event["text"])
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return TrainerDied("the training process was killed, perhaps for its memory; it goes on when started again")
    return TrainerDied(
        f"the training process ended with code {code}: {last_complaint(complaints)}; run with --debug for all it said"
    )


def last_complaint(complaints: str) -> str:
    """What an error says of itself; else the last line. Below it torchrun draws a table."""
    lines = [line.strip() for line in complaints.splitlines() if line.strip(" =-")]
    errors_ = [line for line in lines if re.match(r"(\[rank\d+\]:\s*)?[\w.]*(Error|Exception|Interrupt)\b", line)]
    own = [line for line in errors_ if "ChildFailedError" not in line]
    return (own or errors_ or lines or ["no message"])[-1][:300]
