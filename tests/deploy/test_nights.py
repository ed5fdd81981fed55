"""Nights of a real installation: servers, worker, deployments, serving and whoever is told, all as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Cancelled, Cancelling

from flows import devices
from llava_pipeline.contracts import Cursor
from tests.deploy.installation import MODEL, NIGHT_SECONDS, Installation, installed, short, wait_until

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]  # every one of them shares an installation that is up
BETTER = {"data": {"max_samples": 3200}, "training": {"max_steps": 100}}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with installed(tmp_path_factory.mktemp("an installation")) as made:
        yield made


@pytest.fixture(scope="module")
def first(installation: Installation) -> Installation:
    """After a first night, which was promoted and is served."""
    night = installation.night(data={"max_samples": 1280}, evaluation={"max_samples": 150})
    assert night.state is not None
    assert night.state.is_completed(), f"{night.state}; {installation.said('worker')[-3000:]}"
    installation.wait_for_serving("1")
    return installation


def test_up_leaves_a_working_installation_that_can_be_asked_about(installation: Installation) -> None:
    found = {one["name"]: one["state"] for one in installation.json("status")["services"]}
    assert found | {"serving": "up"} == dict.fromkeys(("mlflow", "prefect", "worker", "serving"), "up")
    findings = installation.json("doctor", expect=None)["findings"]
    assert [one for one in findings if one["status"] == "problem"] == []
    with installation.prefect() as client:
        names = {f"{client.read_flow(one.flow_id).name}/{one.name}" for one in client.read_deployments()}
    assert names == {
        "train-projector/nightly", "evaluate-champion/weekly", "ship/hourly", "sweep/sweep", "promote/promote",
        "rollback/rollback",
    }  # fmt: skip


def test_up_said_again_starts_only_what_has_died(installation: Installation) -> None:
    before = {name: installation.pid(name) for name in ("mlflow", "prefect", "worker", "serving")}
    installation.kill("worker")
    assert installation.say("status", expect=1).returncode == 1
    found = installation.up()
    assert {name: one["pid"] for name, one in found.items()} == before | {"worker": installation.pid("worker")}
    assert installation.pid("worker") != before["worker"]


def test_what_automations_wait_for_is_not_forgotten_by_another_up(installation: Installation) -> None:
    """Prefect forgets it when an automation is updated, so one that is right already is not."""

    def updated() -> dict[str, str]:
        with installation.prefect() as client:
            found = client.request("POST", "/automations/filter", json={}).json()
        return {one["name"]: one["updated"] for one in found}

    before = updated()
    installation.up()
    assert updated() == before
    assert len(before) == 8


def test_prefect_deploy_all_takes_the_file(installation: Installation) -> None:
    command = ["--no-prompt", "deploy", "--prefect-file", "deploy/prefect.yaml", "--all"]
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *command], cwd=ROOT, text=True, capture_output=True, timeout=300,
        env=installation.environment(
            PREFECT_API_URL=installation.addresses.prefect, PREFECT_HOME=str(installation.folder / "shell")
        ),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("successfully created") == 6


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"profile": "no-such"}, "profile"),
        ({"overrides": {"training": {"max_steps": 0}}}, "max_steps"),
        ({"overrides": {"training": {"max_stepz": 3}}}, "max_stepz"),
        ({"overrides": {"data": {"source": {"kind": "carrier pigeon"}}}}, "carrier pigeon"),
    ],
)
def test_wrong_parameters_are_refused_by_the_server_with_the_field(
    installation: Installation, parameters: dict[str, object], field: str
) -> None:
    with pytest.raises(PrefectHTTPStatusError, match=field) as refused:
        installation.begin("train-projector/nightly", **parameters)
    assert refused.value.response.status_code == 409


def test_two_who_want_the_same_device_take_turns(installation: Installation, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from flows.devices import device_held\n"
        "Path(sys.argv[1]).touch()\n"
        "while not Path('go').exists(): time.sleep(0.01)\n"
        "with device_held('cpu'):\n"
        "    began = time.time(); time.sleep(2); print(began, time.time())"
    )
    environment = installation.environment(
        PREFECT_API_URL=installation.addresses.prefect, PREFECT_HOME=str(tmp_path), PREFECT_LOGGING_LEVEL="CRITICAL"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, name], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    wait_until(lambda: all((tmp_path / name).exists() for name in ("one", "two")) or None, 60, "they do not start")
    (tmp_path / "go").touch()
    times = sorted(tuple(map(float, one.communicate(timeout=120)[0].split())) for one in both)
    assert times[0][1] <= times[1][0]


def test_a_night_that_no_worker_begins_is_told(installation: Installation) -> None:
    """With twenty seconds of patience instead of a quarter of an hour; `up` puts that right again."""
    installation.kill("worker")
    installation.hasten("llava-pipeline: missed", 20)
    late = installation.begin("train-projector/nightly", profile="tiny")
    installation.receiver.wait_for("train-projector missed", "no worker takes it", seconds=120)
    with installation.prefect() as client:
        client.set_flow_run_state(late, Cancelled())
    installation.up()
    with installation.prefect() as client:
        (there,) = client.read_automations_by_name("llava-pipeline: missed")
    assert there.trigger.within == timedelta(minutes=15)


def test_three_nights_in_a_row(first: Installation) -> None:
    """Promoted; refused, and its reason told; promoted while Prefect's server is killed; serving follows each time."""
    told = first.receiver
    told.wait_for("promoted", "Version 1", "the first one")

    refused = first.night(training={"max_steps": 1})
    assert refused.state is not None
    assert refused.state.is_completed(), refused.state
    assert first.aliases() == {"champion": "1", "challenger": "2"}
    told.wait_for(f"Version 2 of {MODEL} was refused by", "version 1 stays champion", "/#/experiments/")
    assert first.served() == "1"

    third = first.begin("train-projector/nightly", overrides=short(**BETTER))
    first.wait_for_training(third)
    first.kill("prefect")
    assert first.up()["prefect"]["state"] == "up"
    with first.prefect() as client:
        assert client.read_global_concurrency_limit_by_name(devices.cpu()).active_slots == 1
    night = first.end(third)
    assert night.state is not None
    assert night.state.is_completed(), f"{night.state}; {first.said('worker')[-3000:]}"
    assert first.aliases() == {"champion": "3", "previous": "1"}
    told.wait_for("promoted", "Version 3", "version 1 was before")
    first.wait_for_serving("3")

    nights = [run for run in first.runs() if run.data.tags.get("llava.registered_version")]
    ended = [Cursor.model_validate_json(run.data.tags["llava.data.cursor"]) for run in nights]
    assert [cursor.row for cursor in ended] == sorted({cursor.row for cursor in ended}), "each goes on behind the last"
    assert all(run.info.status == "FINISHED" for run in nights)
    assert len([text for text in told.texts if "promoted" in text]) == 2


def test_a_night_that_is_cancelled_leaves_no_process_and_a_failed_run(first: Installation) -> None:
    flow_run_id = first.begin("train-projector/nightly", overrides=short(training={"max_steps": 500}))
    first.wait_for_training(flow_run_id)
    processes = first.processes_of(flow_run_id)
    assert any("llava_pipeline.training" in " ".join(one.cmdline()) for one in processes)
    with first.prefect() as client:
        client.set_flow_run_state(flow_run_id, Cancelling())
    night = first.end(flow_run_id)
    assert night.state is not None
    assert night.state.is_cancelled()
    assert psutil.wait_procs(processes, 60)[1] == []
    first.receiver.wait_for("cancelled")
    wait_until(lambda: first.runs()[-1].info.status != "RUNNING" or None, 30, "its run is running still")


def test_a_night_killed_with_its_worker_is_told_and_finished_by_the_next_in_the_same_run(first: Installation) -> None:
    overrides = short(training={"max_steps": 60, "checkpoint_seconds": 1, "seed": 5})
    first.hasten("llava-pipeline: a run without a heartbeat has crashed", 75)  # instead of five minutes
    killed = first.begin("train-projector/nightly", overrides=overrides)
    first.wait_for_training(killed, step=12)
    wait_until(lambda: first.runs()[-1].info.status == "RUNNING" or None, 60, "no run is begun in MLflow")
    run_id = first.runs()[-1].info.run_id
    processes = first.processes_of(killed)
    first.kill("worker")
    for process in processes:
        if process.is_running():
            os.kill(process.pid, signal.SIGKILL)
    assert psutil.wait_procs(processes, 60)[1] == []
    night = first.end(killed)
    assert night.state is not None
    assert night.state.is_crashed(), night.state
    first.receiver.wait_for("crashed", "no heartbeat came any more")
    assert first.up()["worker"]["state"] == "up"
    number = len(first.runs())

    following = first.end(first.begin("train-projector/nightly", overrides=overrides))
    assert following.state is not None
    assert following.state.is_completed(), f"{following.state}; {first.said('worker')[-3000:]}"
    assert len(first.runs()) == number
    run = first.mlflow().get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["prefect.flow_run_id"] == str(following.id)
    assert run.data.tags["llava.goes_on_from"] == str(killed)
    steps = [point.step for point in first.mlflow().get_metric_history(run_id, "train/loss")]
    assert sorted(steps) == list(range(1, 61))


def test_a_night_without_mlflow_is_recorded_in_the_morning(first: Installation) -> None:
    before = len(first.runs())
    first.kill("mlflow")
    overrides = short(data={"increment": False}, training={"max_steps": 5, "seed": 9})
    night = first.end(first.begin("train-projector/nightly", overrides=overrides), seconds=600)
    assert night.state is not None
    assert night.state.is_failed()
    first.receiver.wait_for("failed", "MLflow at", "does not answer")
    assert len(list(first.home.glob("spool/*.json"))) == 1
    first.up()
    shipped = first.end(first.begin("ship/hourly"))
    assert shipped.state is not None
    assert shipped.state.is_completed(), f"{shipped.state}; {first.said('worker')[-3000:]}"
    assert list(first.home.glob("spool/*.json")) == []
    assert len(first.runs()) == before + 1
    run = first.runs()[-1]
    assert run.data.tags["prefect.flow_run_id"] == str(night.id)
    assert (run.info.status, run.data.tags["llava.gate"]) == ("FINISHED", "refused")


def test_down_leaves_nothing_behind(installation: Installation) -> None:
    """The last one: it ends what the others need."""
    began = time.monotonic()
    assert set(installation.json("down")["ended"]) == {"mlflow", "prefect", "worker", "serving"}
    assert wait_until(lambda: not installation.left() or None, 30, str(installation.left()))
    assert time.monotonic() - began < NIGHT_SECONDS
    assert {one["state"] for one in installation.json("status")["services"]} == {"down"}
    assert installation.say("up", expect=None, MLFLOW_TRACKING_URI="").returncode == 0
    assert installation.aliases()["champion"] == "3", "what was recorded is there again"
