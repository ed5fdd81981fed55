"""What ``llava-pipeline doctor`` finds here and of MLflow; what it asks Prefect stands in test_databases.py."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows import findings
from llava_pipeline.operations import machine, servers, services
from llava_pipeline.operations.finding import Finding
from llava_pipeline.tracking import health, registry, spool
from llava_pipeline.tracking.client import connect, ensure_experiment
from llava_pipeline.tracking.settings import FILE_VARIABLE, Settings
from llava_pipeline.tracking.stale import PROCESS, this_process
from tests.cli.conftest import Command
from tests.deploy.recorded import NAME, SPEC

AWAY = "http://127.0.0.1:9"
DEAD = this_process().rsplit(":", 1)[0] + ":1.00"  # this process's number, begun long before it


def of(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


def of_mlflow(settings: Settings) -> dict[str, Finding]:
    return of(servers.of_mlflow(settings, health.look(settings)))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and no hub."""
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", AWAY)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


Answering = Callable[[dict[str, Any]], str]


@pytest.fixture
def answering() -> Iterator[Answering]:
    """A server that says of itself what it is told to, with a clock that is an hour slow."""
    started = []

    def start(told: dict[str, Any]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(json.dumps(told).encode())

            def do_HEAD(self) -> None:
                self.do_GET()

            def date_time_string(self, timestamp: float | None = None) -> str:
                return formatdate(time.time() - 3600, usegmt=True)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/readyz"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def test_with_nothing_up_there_are_warnings_only_and_no_server_is_started(home: Path, command: Command) -> None:
    before = set(psutil.Process().children(recursive=True))
    ended = command("doctor", "--profile", "tiny", "--json")
    told = ended.document
    assert (ended.exit_code, told["well"]) == (0, True)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert {name for name, finding in found.items() if finding["status"] == "warning"} >= {"hub", "MLflow", "Prefect"}
    assert all(finding["remedy"] for finding in told["findings"] if finding["status"] != "ok")
    assert found["Prefect"]["remedy"] == "`llava-pipeline up`"
    assert set(psutil.Process().children(recursive=True)) == before
    assert not (home / "mlflow.db").exists()
    assert not list(home.glob("prefect/prefect.db*"))


def test_a_problem_ends_with_exit_code_1_and_the_table_says_what_to_do(
    home: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    ended = command("doctor", "--profile", "tiny")
    assert ended.exit_code == 1
    assert "error" not in ended.err
    text = " ".join(ended.out.split())
    assert f"MLflow at {AWAY} does not answer" in text
    assert "to do: start it with `llava-pipeline up`" in text


def test_a_library_of_another_version_and_a_missing_one_are_problems(home: Path) -> None:
    asked = ["numpy<1", "pydantic>=2", "no-such-library>=1", "boto3<0; extra == 'servers'"]
    found = of(machine.libraries(asked))
    assert sorted(found) == ["library no-such-library", "library numpy"]
    assert {finding.status for finding in found.values()} == {"problem"}
    assert "which is not in <1" in found["library numpy"].found
    assert found["library no-such-library"].found == "not installed"
    (well,) = machine.libraries(["numpy", "pydantic>=2"])
    assert well.status == "ok"


def test_a_full_disk_is_a_problem_and_a_small_one_a_warning(home: Path) -> None:
    assert machine.disk(10**18, 10**18).status == "problem"
    small = machine.disk(0, 10**18)
    assert (small.status, small.remedy.split(",")[0]) == ("warning", "`llava-pipeline gc`")
    assert machine.disk(0, 0).status == "ok"
    assert machine.memory(10**15).status == "warning"
    assert machine.memory(0).status == "ok"


def test_a_hub_that_answers_is_well_and_one_that_is_away_a_warning(
    home: Path, answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.hub().status == "warning"
    monkeypatch.setenv("HF_ENDPOINT", answering({}))
    assert machine.hub().status == "ok"


def serving_says(url: str, settings: Settings) -> Finding:
    asked = settings.model_copy(update={"serving": settings.serving.model_copy(update={"ready_url": url})})
    return servers.serving(asked, NAME, health.look(settings))


def test_whoever_serves_another_version_than_the_champion_is_a_problem(own_home: Path, answering: Answering) -> None:
    def ready(version: str, model: str = NAME) -> str:
        return answering({"ready": True, "model": model, "version": version, "last_error": "champion: version 2"})

    assert serving_says(ready("2"), Settings()).status == "ok"
    other = serving_says(ready("1"), Settings())
    assert (other.status, other.found) == (
        "problem", "version 1 answers, the champion is 2; it says: champion: version 2",
    )  # fmt: skip
    assert serving_says(ready("2", "llava-projector-pocket"), Settings()).status == "warning"
    assert serving_says(f"{AWAY}/readyz", Settings()).status == "problem"
    connect(Settings()).delete_registered_model_alias(NAME, "champion")
    assert serving_says(f"{AWAY}/readyz", Settings()).status == "ok"
    assert serving_says(ready("2"), Settings()).status == "problem"


def test_a_clock_that_is_off_by_an_hour_is_a_problem(home: Path, answering: Answering) -> None:
    found = servers.clock([AWAY, answering({})])
    assert (found.status, found.found) == ("problem", "3600 s apart from that of 127.0.0.1")
    assert servers.clock([AWAY]).status == "ok"


def test_a_home_with_records_is_well_and_its_password_is_not_shown(own_home: Path) -> None:
    found = of_mlflow(Settings())
    assert {finding.status for finding in found.values()} == {"ok"}
    assert set(found) == {"MLflow", "MLflow's schema", "experiment", "running runs"}
    assert health.without_login("postgresql://llava:secret@host/mlflow") == "postgresql://host/mlflow"


def test_a_database_of_another_version_of_mlflow_is_a_problem_with_the_command(own_home: Path) -> None:
    with sqlite3.connect(own_home / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    other = own_home.rename(own_home.with_name("other"))  # a name that MLflow has not opened yet
    found = of_mlflow(Settings.model_validate({"tracking": {"uri": f"sqlite:///{other / 'mlflow.db'}"}}))["MLflow"]
    assert (found.status, "out-of-date database schema" in found.found) == ("problem", True)
    assert "`mlflow db upgrade`" in found.remedy


def test_an_experiment_that_was_deleted_is_a_problem_and_a_missing_one_a_warning(own_home: Path) -> None:
    other = Settings.model_validate({"tracking": {"experiment": "another"}})
    assert of_mlflow(other)["experiment"].status == "warning"
    connect(Settings()).delete_experiment(ensure_experiment(connect(Settings()), Settings()))
    assert of_mlflow(Settings())["experiment"].status == "problem"


def test_runs_whose_process_is_gone_are_told(own_home: Path) -> None:
    client = connect(Settings())
    experiment = ensure_experiment(client, Settings())
    client.create_run(experiment, tags={PROCESS: this_process()}, run_name="alive")
    assert of_mlflow(Settings())["running runs"].status == "ok"
    client.create_run(experiment, tags={PROCESS: DEAD}, run_name="dead")
    found = of_mlflow(Settings())["running runs"]
    assert (found.status, "1 shown as running" in found.found, "dead (" in found.found) == ("warning", True, True)


def test_nights_that_wait_are_a_warning_and_refused_ones_a_problem(own_home: Path) -> None:
    assert machine.spool().status == "ok"
    evaluation = registry.recorded_evaluation(registry.run_of_version(NAME, "1", Settings()), Settings())
    night = spool.keep(SPEC, evaluation, {"prefect.flow_run_id": "one"}, 0.0).model_copy(update={"process": DEAD})
    night.path.write_text(night.model_dump_json())
    found = machine.spool()
    assert (found.status, found.found) == ("warning", "1 nights wait to be recorded, since 1970-01-01 00:00 UTC")
    spool.refuse(night, "its rows are gone")
    assert machine.spool().status == "problem"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"server": {"host": "0.0.0.0"}}, "security: MLflow"),
        ({"server": {"allowed_hosts": ["*"]}}, "security: MLflow"),
        ({"prefect": {"host": "192.168.1.5"}}, "security: Prefect"),
        ({"serving": {"host": "::"}}, "security: serving"),
    ],
)
def test_a_server_that_others_reach_without_a_login_is_a_problem(
    settings: dict[str, Any], told: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(services.LOGIN_VARIABLE, raising=False)
    (found,) = servers.security(Settings.model_validate(settings))
    assert (found.name, found.status) == (told, "problem")


def test_a_server_that_asks_for_a_login_or_is_bound_to_loopback_is_well(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [finding.status for finding in servers.security(Settings())] == ["ok"]
    monkeypatch.setenv(services.LOGIN_VARIABLE, "admin:secret")
    keys = tmp_path / "keys.txt"
    keys.write_text("")
    keys.chmod(0o600)
    guarded = {
        "server": {"host": "0.0.0.0", "auth": True}, "prefect": {"host": "0.0.0.0"},
        "serving": {"host": "0.0.0.0", "keys": str(keys)},
    }  # fmt: skip
    assert [finding.status for finding in servers.security(Settings.model_validate(guarded))] == ["ok"]


def test_a_settings_file_with_a_password_that_others_can_read_is_told(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yml"
    file.write_text("server: {backend_store_uri: 'postgresql://llava:secret@db/mlflow'}\n")
    file.chmod(0o644)
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    settings = Settings.model_validate({"server": {"backend_store_uri": "postgresql://llava:secret@db/mlflow"}})
    (found,) = servers.security(settings)
    assert (found.status, found.remedy.startswith(f"chmod 600 {file}"), "secret@" in found.found) == (
        "warning", True, False,
    )  # fmt: skip
    file.chmod(0o600)
    assert [finding.status for finding in servers.security(settings)] == ["ok"]


def test_a_prefect_server_that_does_not_answer_is_a_problem(home: Path) -> None:
    (found,) = findings.findings(f"{AWAY}/api")
    assert (found.name, found.status) == ("Prefect", "problem")
    assert f"the server at {AWAY}/api does not answer" in found.found
