"""What the commands of an installation say, before and without any server."""

from __future__ import annotations

import json
import shlex
import socket
from pathlib import Path

import pytest
import yaml

from llava_pipeline.operations import processes, services
from llava_pipeline.tracking.settings import Settings, load_settings, server_command
from tests.deploy.installation import Installation

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nothing_up(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "a folder")


@pytest.mark.parametrize(("section", "name"), [("server", "mlflow"), ("prefect", "prefect"), ("serving", "serving")])
def test_a_port_that_is_taken_is_told_before_anything_starts(nothing_up: Installation, section: str, name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", nothing_up.ports[section]))
        taken.listen()
        done = nothing_up.say("up", expect=2)
    port = nothing_up.ports[section]
    assert f"something else listens on 127.0.0.1:{port} already, where {name} would" in done.stderr
    assert f"another {section}.port in mlflow.yml" in done.stderr
    assert not list(nothing_up.home.glob("services/*.json"))
    assert nothing_up.left() == []


@pytest.mark.slow
def test_what_was_started_is_ended_when_a_server_does_not_come_up(nothing_up: Installation) -> None:
    (nothing_up.home / "prefect").mkdir(parents=True)
    (nothing_up.home / "mlflow.db").write_text("no database")
    done = nothing_up.say("up", expect=1)
    assert "error: mlflow has ended right after its start: " in done.stderr
    assert str(nothing_up.home / "services" / "mlflow.log") in done.stderr
    assert nothing_up.left() == []
    assert not (nothing_up.home / "services" / "addresses.json").exists()


def test_status_and_down_of_what_was_never_up(nothing_up: Installation) -> None:
    assert {one["state"] for one in nothing_up.json("status")["services"]} == {"down"}
    assert nothing_up.json("down") == {"ended": []}


@pytest.mark.parametrize("command", ["deploy", "worker"])
def test_without_a_prefect_server_the_remedy_is_told(nothing_up: Installation, command: str) -> None:
    assert "say `llava-pipeline up`, or set PREFECT_API_URL" in nothing_up.say(command, expect=2).stderr


def test_a_pool_of_no_known_kind_is_refused(nothing_up: Installation) -> None:
    done = nothing_up.say("deploy", "--pool", "cloud", expect=2, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert "flow runs run as process, docker or kubernetes jobs" in done.stderr


def test_a_prefect_server_that_is_away_is_told_in_one_sentence(nothing_up: Installation) -> None:
    done = nothing_up.say("deploy", expect=1, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert "error: Prefect at http://127.0.0.1:9/api does not take it: " in done.stderr
    assert "Traceback" not in done.stderr


def test_printed_is_what_is_started(nothing_up: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = nothing_up.say("mlflow-server", "--print").stdout
    *variables, command = printed.replace("\\\n", "\n").strip().splitlines()
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(nothing_up.home))
    assert shlex.split(command) == server_command(load_settings(nothing_up.folder / "mlflow.yml"))
    assert dict(shlex.split(line)[0].split("=", 1) for line in variables) == {
        "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def test_a_password_of_the_environment_stands_on_no_command_line(nothing_up: Installation) -> None:
    secret = "postgresql+psycopg2://mlflow:hunter2@127.0.0.1/mlflow"
    printed = nothing_up.say("mlflow-server", "--print", MLFLOW_BACKEND_STORE_URI=secret).stdout
    assert "--backend-store-uri" not in printed
    assert "hunter2" not in printed


def test_what_a_person_has_set_for_prefect_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_SERVER_ANALYTICS_ENABLED")  # the tests' own
    monkeypatch.setenv("PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED", "false")
    own = services.prefect_server(Settings()).environment
    assert "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED" not in own
    assert own["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_the_process_of_another_start_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path))
    processes.start("one", ["sleep", "60"], {})
    noted = tmp_path / "services" / "one.json"
    process = processes.running("one")
    assert process is not None
    try:
        told = json.loads(noted.read_text())
        noted.write_text(json.dumps(told | {"began": "1" + told["began"]}))
        assert processes.running("one") is None
        noted.write_text(json.dumps(told))
        assert processes.stop(["one"]) == ["one"]
        assert not process.is_running()
    finally:
        if process.is_running():
            process.kill()


def test_what_was_started_in_a_session_of_its_own_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path))
    monkeypatch.setattr(processes, "SECONDS_TO_END", 2.0)
    processes.start("one", ["bash", "-c", "setsid bash -c 'trap \"\" TERM; sleep 60; true' & wait"], {})
    process = processes.running("one")
    assert process is not None
    while len(family := process.children(recursive=True)) < 2:
        assert process.is_running()
    processes.stop(["one"])
    assert [child for child in family if child.is_running() and child.status() != "zombie"] == []


def test_the_schedule_has_a_time_zone_and_no_second_night_begins_beside_the_first() -> None:
    deployed = yaml.safe_load((ROOT / "deploy" / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    scheduled = {one["entrypoint"]: one for one in deployed if "schedules" in one}
    assert set(scheduled) == {"flows.nightly.nightly", "flows.champion.evaluate_champion", "flows.ship.ship"}
    for one in scheduled.values():
        assert all(schedule["timezone"] for schedule in one["schedules"])
        if one["name"] != "hourly":  # which leaves it to the one before by itself, and cancels nothing
            assert one["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
