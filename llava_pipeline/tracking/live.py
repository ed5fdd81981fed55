"""Steps in MLflow while they are taken. MLflow may be away: they wait here, and are sent when it is back.

What is still waiting when the training has ended is sent while the pipeline goes on. Steps are not lost even where this
process dies: ``run.record`` sends what is missing of the curve from the history. Steps that a training takes again when
it goes on from a checkpoint are sent once.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Any

from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import content
from llava_pipeline.tracking.client import connect, first_line
from llava_pipeline.tracking.machine import Machine
from llava_pipeline.tracking.run import TRAINING, adopt, as_metric, begin, points_there
from llava_pipeline.tracking.settings import Settings

_log = logging.getLogger(__name__)
SECONDS_BETWEEN = 5.0
SECONDS_BETWEEN_LOOKS = 10.0  # at the machine
SECONDS_TO_FINISH = 10.0
SECONDS_AFTERWARDS = 600.0  # for what waits when the training has ended
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
        self.training: str | None = None  # its folder's name: the same for a training that is gone on with
        self.trains = False  # it has begun; before that no run is
        self.run_id: str | None = None
        self.last_step = 0  # that an attempt before this one has sent
        self.client: Any = None
        self.machine: Machine | None = None
        self.thread = threading.Thread(target=self._work, name="mlflow-live", daemon=True)
        self.thread.start()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take a step's metrics, and before them which training it is."""
        if event["event"] == "training":
            self.training = str(event["id"])
        if event["event"] in ("training", "step"):
            self.trains = True
            with self.lock:
                self.waiting += content.step_points(event)

    def close(self) -> None:
        """Send what is waiting, for some seconds at most; what then still waits is sent while others go on."""
        self.ending.set()
        self.thread.join(SECONDS_TO_FINISH)
        self.closed = True

    def _work(self) -> None:
        looked, give_up = 0.0, math.inf
        while time.monotonic() < give_up:
            if self.ending.wait(self.seconds_between) and give_up == math.inf:
                give_up = time.monotonic() + SECONDS_AFTERWARDS
            try:
                if not self.ending.is_set() and time.monotonic() - looked >= SECONDS_BETWEEN_LOOKS:
                    looked = time.monotonic()
                    self._look()
                self._ship()
                self.told = False
            except Exception as error:  # whatever is wrong with MLflow, the training goes on
                if not self.told:
                    _log.warning("MLflow is away (%s); the training goes on, its steps wait", first_line(error))
                self.told = True
            if self.ending.is_set():
                if not self.waiting or (self.closed and self.run_id is None):
                    return
                time.sleep(self.seconds_between)

    def _look(self) -> None:
        if self.machine is None:
            self.machine = Machine(self.started)
        with self.lock:
            self.waiting += self.machine.points(time.time())

    def _ship(self) -> None:
        """Send everything that waits; a part that could not be sent waits on.

        Once recording has its turn nothing is begun here: there would be two runs.
        """
        if self.client is None:
            self.client = connect(self.settings)
        if self.run_id is None:
            if self.closed or not self.trains:
                return
            if self.training is not None:
                adopt(self.client, self.settings, self.tags, self.training)
            _, run_id = begin(self.client, self.spec, self.settings, self.tags, self.started, gives_way=True)
            if self.training is not None:
                self.client.set_tag(run_id, TRAINING, self.training)
            self.last_step = max((step for _, step in points_there(self.client, run_id, ["train/loss"])), default=0)
            self.run_id = run_id
        while self.waiting:
            with self.lock:
                part = self.waiting[:MAX_POINTS]
            new = [point for point in part if not (point.key.startswith("train/") and point.step <= self.last_step)]
            if new:
                self.client.log_batch(self.run_id, metrics=[as_metric(point) for point in new])
            with self.lock:
                del self.waiting[: len(part)]
