"""Steps in MLflow while they are taken. MLflow may be away: they wait here, and are sent when it is back.

What is still waiting at the end is not lost either: ``run.record`` sends the whole curve from the history.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import content
from llava_pipeline.tracking.client import connect, first_line
from llava_pipeline.tracking.machine import Machine
from llava_pipeline.tracking.run import as_metric, begin
from llava_pipeline.tracking.settings import Settings

_log = logging.getLogger(__name__)
SECONDS_BETWEEN = 5.0
SECONDS_BETWEEN_LOOKS = 10.0  # at the machine
SECONDS_TO_FINISH = 10.0
MAX_POINTS = 1000  # that MLflow takes at once


class Live:
    """Sends what it is called with, from a thread of its own, so that no step waits for MLflow.

    Args:
        spec: of the pipeline run.
        settings: where MLflow is.
        tags: of the run; ``prefect.flow_run_id`` says which one it is.
        started: when the pipeline run began, in seconds since the epoch.
        seconds_between: two shipments.
    """

    def __init__(
        self, spec: RunSpec, settings: Settings, tags: dict[str, str], started: float,
        seconds_between: float = SECONDS_BETWEEN,
    ) -> None:  # fmt: skip
        self.spec, self.settings, self.tags, self.started = spec, settings, tags, started
        self.seconds_between = seconds_between
        self.waiting: list[content.Point] = []
        self.lock, self.ending, self.told = threading.Lock(), threading.Event(), False
        self.closed = False
        self.run_id: str | None = None
        self.client: Any = None
        self.thread = threading.Thread(target=self._work, name="mlflow-live", daemon=True)
        self.thread.start()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take a step's metrics."""
        if event["event"] == "step":
            with self.lock:
                self.waiting += content.step_points(event)

    def close(self) -> None:
        """Send what is waiting, for some seconds at most."""
        self.ending.set()
        self.thread.join(SECONDS_TO_FINISH)
        self.closed = True

    def _work(self) -> None:
        machine, looked, ended = Machine(self.started), 0.0, False
        while not ended:
            ended = self.ending.wait(self.seconds_between)
            if time.monotonic() - looked >= SECONDS_BETWEEN_LOOKS:
                looked = time.monotonic()
                with self.lock:
                    self.waiting += machine.points(time.time())
            try:
                self._ship()
                self.told = False
            except Exception as error:  # whatever is wrong with MLflow, the training goes on
                if not self.told:
                    _log.warning("MLflow is away (%s); the training goes on, its steps wait", first_line(error))
                self.told = True

    def _ship(self) -> None:
        """Send everything that waits; a part that could not be sent waits on.

        Once recording has its turn nothing is begun here: there would be two runs.
        """
        if self.closed:
            return
        if self.client is None:
            self.client = connect(self.settings)
        if self.run_id is None and not self.closed:
            _, self.run_id = begin(self.client, self.spec, self.settings, self.tags, self.started, gives_way=True)
        while self.waiting and not self.closed:
            with self.lock:
                part = self.waiting[:MAX_POINTS]
            self.client.log_batch(self.run_id, metrics=[as_metric(point) for point in part])
            with self.lock:
                del self.waiting[: len(part)]
