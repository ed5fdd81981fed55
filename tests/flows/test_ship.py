"""A night that MLflow was away for is recorded in the morning, once, and judged."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from flows.ship import ship
from flows.train import train
from llava_pipeline.contracts import Evaluation, Verdict
from llava_pipeline.errors import NotShipped
from llava_pipeline.spec import load_spec
from llava_pipeline.stages.last_place import where_the_last_run_stopped
from llava_pipeline.tracking import registry, spool
from llava_pipeline.tracking.client import connect, ensure_experiment
from llava_pipeline.tracking.settings import Settings

pytestmark = pytest.mark.slow  # every one of them shares what takes long to come up

SPEC = load_spec("tiny")
DEAD = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def evaluation(home: Path) -> Evaluation:
    verdict: Verdict = train(SPEC)
    return registry.recorded_evaluation(verdict.run_id, Settings())


def spool_and_die(evaluation: Evaluation, flow_run: str, began: float = 1.0) -> None:
    """As a night does that is killed, or fails, while it records."""

    def night() -> None:
        spool.keep(SPEC, evaluation, {"prefect.flow_run_id": flow_run}, began)
        os.kill(os.getpid(), signal.SIGKILL)

    child = get_context("fork").Process(target=night)
    child.start()
    child.join(60)


def runs_of(flow_run: str) -> list[str]:
    client = connect(Settings())
    asked = f"tags.`prefect.flow_run_id` = '{flow_run}'"
    return [run.info.run_id for run in client.search_runs([ensure_experiment(client, Settings())], filter_string=asked)]


def test_it_waits_while_mlflow_is_away_and_is_recorded_once_when_it_is_back(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool_and_die(evaluation, "cut off")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", DEAD)
        assert ship() == 0
        assert [night.tags["prefect.flow_run_id"] for night in spool.waiting()] == ["cut off"]
    assert ship() == 1
    assert spool.waiting() == []
    (run_id,) = runs_of("cut off")
    run = connect(Settings()).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["llava.registered_version"] == "2"
    assert run.data.tags["llava.gate"] in ("passed", "refused")
    assert ship() == 0
    assert runs_of("cut off") == [run_id]


def test_a_night_that_another_process_is_at_is_left_to_it(evaluation: Evaluation) -> None:
    kept = spool.keep(SPEC, evaluation, {"prefect.flow_run_id": "mine"}, 1.0)
    assert ship() == 0
    assert kept.path.is_file()
    spool.forget(kept.tags)
    assert not kept.path.exists()


def test_one_that_is_refused_is_put_aside_and_the_others_are_shipped(evaluation: Evaluation) -> None:
    lost = evaluation.answers.model_copy(update={"digest": "0" * 64})
    spool_and_die(evaluation.model_copy(update={"answers": lost}), "damaged", began=1.0)
    spool_and_die(evaluation, "whole", began=2.0)
    with pytest.raises(NotShipped, match=r"damaged\.json: answers 000000000000 is not in the store.*move it back"):
        ship()
    assert spool.waiting() == []
    assert len(runs_of("whole")) == 1
    aside = spool.home() / "spool" / "refused"
    assert sorted(path.name for path in aside.iterdir()) == ["damaged.json", "damaged.txt"]


def test_the_next_increment_begins_behind_a_night_that_waits(evaluation: Evaluation) -> None:
    data = evaluation.projector.data
    further = data.ended.model_copy(update={"row": data.ended.row + 7})
    waits = evaluation.projector.model_copy(update={"data": data.model_copy(update={"ended": further})})
    for began, expected in ((time.time(), further), (1.0, data.ended)):  # behind the recorded one, and before it
        spool_and_die(evaluation.model_copy(update={"projector": waits}), "waits", began=began)
        assert where_the_last_run_stopped(evaluation.projector.model, data.origin) == expected
        spool.forget({"prefect.flow_run_id": "waits"})
