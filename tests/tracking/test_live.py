"""Steps arrive in MLflow while they are taken, wait while it is away, and none is lost or doubled."""

from __future__ import annotations

import os
import signal
from itertools import count
from multiprocessing import get_context
from typing import Any

import pytest

from llava_pipeline.errors import TrackingUnavailable
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import content, live
from llava_pipeline.tracking.client import connect, ensure_experiment
from llava_pipeline.tracking.live import Live
from llava_pipeline.tracking.run import record
from llava_pipeline.tracking.settings import Settings
from llava_pipeline.tracking.stale import sweep_stale
from tests.tracking.conftest import NUM_STEPS, MakeEvaluation

TAGS = {"prefect.flow_run_id": "abc"}
STARTED = 1_795_509_060.0


def steps(evaluation: Any) -> list[dict[str, Any]]:
    return [row | {"event": "step"} for row in content.read_rows(content.history(evaluation))]


def test_steps_are_sent_once_and_recording_goes_on_with_the_same_run(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings
) -> None:
    evaluation = make_evaluation()
    sender = Live(spec, settings, TAGS, STARTED, seconds_between=0.05)
    for event in steps(evaluation)[:-1]:  # the last one is never sent: recording sends it
        sender(event)
    sender({"event": "note", "level": "info", "text": "no step"})
    sender.close()
    client = connect(settings)
    assert sender.run_id is not None
    assert client.get_run(sender.run_id).info.status == "RUNNING"
    assert len(client.get_metric_history(sender.run_id, "train/loss")) == NUM_STEPS - 1
    recorded = record(spec, evaluation, settings, TAGS, started=STARTED)
    assert recorded.run_id == sender.run_id
    curve = client.get_metric_history(sender.run_id, "train/loss")
    assert [(point.step, point.value) for point in curve] == [(1, 3.0), (2, 1.5), (3, 1.0)]


def test_steps_wait_while_mlflow_is_away(
    spec: RunSpec,
    make_evaluation: MakeEvaluation,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries = count()

    def away_at_first(asked: Settings) -> Any:
        if next(tries) < 3:
            raise TrackingUnavailable("no MLflow at this address")
        return connect(asked)

    monkeypatch.setattr(live, "connect", away_at_first)
    sender = Live(spec, settings, TAGS, STARTED, seconds_between=0.05)
    for event in steps(make_evaluation()):
        sender(event)
    while next(tries) < 8 and sender.waiting:
        sender.ending.wait(0.2)
    sender.close()
    assert sender.run_id is not None
    assert len(connect(settings).get_metric_history(sender.run_id, "train/loss")) == NUM_STEPS
    assert [r.message for r in caplog.records if r.name == live.__name__] == [
        "MLflow is away (no MLflow at this address); the training goes on, its steps wait"
    ]


def test_steps_that_a_training_takes_again_after_a_kill_are_there_once(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings
) -> None:
    evaluation = make_evaluation()
    for later in (-30.0, 0.0):  # the second attempt goes on from a checkpoint behind the first step
        sender = Live(spec, settings, TAGS, STARTED, seconds_between=0.05)
        for event in steps(evaluation)[:2]:
            sender(event | {"time": event["time"] + later})
        sender.close()
    recorded = record(spec, evaluation, settings, TAGS, started=STARTED)
    curve = connect(settings).get_metric_history(recorded.run_id, "train/loss")
    assert [(point.step, point.value) for point in curve] == [(1, 3.0), (2, 1.5), (3, 1.0)]


def test_a_training_that_a_killed_process_began_goes_on_in_its_run(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings
) -> None:
    evaluation = make_evaluation()
    events = steps(evaluation)

    def watch(flow_run: str, training: str, *told: dict[str, Any]) -> Live:
        sender = Live(spec, settings, {"prefect.flow_run_id": flow_run}, STARTED, seconds_between=0.05)
        for event in ({"event": "training", "id": training}, *told):
            sender(event)
        sender.close()
        return sender

    def begin_and_die() -> None:
        watch("killed", "a", *events[:2])
        os.kill(os.getpid(), signal.SIGKILL)

    child = get_context("fork").Process(target=begin_and_die)
    child.start()
    child.join(60)
    client = connect(settings)
    (begun,) = client.search_runs([ensure_experiment(client, settings)])
    assert watch("of another training", "b", events[0]).run_id != begun.info.run_id
    sweep_stale(settings)
    assert client.get_run(begun.info.run_id).info.status == "FAILED"

    assert watch("following", "a", *events).run_id == begun.info.run_id
    tags = {"prefect.flow_run_id": "following"}
    assert record(spec, evaluation, settings, tags, started=STARTED).run_id == begun.info.run_id
    run = client.get_run(begun.info.run_id)
    assert (run.info.status, run.data.tags["llava.goes_on_from"]) == ("FINISHED", "killed")
    assert "llava.failure" not in run.data.tags
    curve = client.get_metric_history(begun.info.run_id, "train/loss")
    assert [point.step for point in curve] == [1, 2, 3]
    assert watch("a night later", "a", events[0]).run_id != begun.info.run_id, "what is finished is not gone on with"
