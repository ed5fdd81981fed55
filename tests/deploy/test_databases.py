"""Both servers on PostgreSQL, artifacts in an S3 store: recorded, promoted, restarted, backed up, restored.

Each server is started once, by the command that its settings stand for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from flows import findings
from flows.automations import PREFIX
from llava_pipeline.errors import BackupRefused
from llava_pipeline.operations import backup, databases, restore, services
from llava_pipeline.operations.finding import Finding
from llava_pipeline.tracking import promotion, registry
from llava_pipeline.tracking.client import connect, find_experiment
from llava_pipeline.tracking.run import record
from llava_pipeline.tracking.settings import ARTIFACTS_VARIABLE, DATABASE_VARIABLE, Settings, load_settings
from tests.deploy.postgres import PASSWORD, QUOTED, Cluster, free_port
from tests.deploy.recorded import NAME, SPEC
from tests.deploy.s3 import S3
from tests.serving.served import copied, settings_of

pytestmark = pytest.mark.slow  # every one of them shares what takes long to come up

BOOT_SECONDS = 150
BUCKET, PREFIX_OF_RUNS = "llava", "runs"


class Servers:
    """MLflow and Prefect as real processes, with what they are started with."""

    def __init__(self, cluster: Cluster, s3: S3, folder: Path) -> None:
        self.cluster, self.s3, self.folder = cluster, s3, folder
        self.ports = (free_port(), free_port())
        self.environment = {
            DATABASE_VARIABLE: cluster.url("mlflow"),
            ARTIFACTS_VARIABLE: f"s3://{BUCKET}/{PREFIX_OF_RUNS}",
            databases.PREFECT_VARIABLE: cluster.url("prefect", "+asyncpg"),
            **s3.environment,
        }
        self.settings = Settings.model_validate({
            "server": {"port": self.ports[0]}, "prefect": {"port": self.ports[1], "api_url": self.api},
            "tracking": {"uri": f"http://127.0.0.1:{self.ports[0]}"},
        })  # fmt: skip

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}/api"

    @contextmanager
    def running(self, *commands: services.Command) -> Iterator[None]:
        """Start servers together, and wait until each answers."""
        health = {"mlflow": f"http://127.0.0.1:{self.ports[0]}/health", "prefect": f"{self.api}/health"}
        processes = []
        try:
            for command in commands:
                said = (self.folder / f"{command.argv[0]}.log").open("ab")
                environment = os.environ | self.environment | command.environment
                executable = str(Path(sys.executable).with_name(command.argv[0]))
                processes.append(subprocess.Popen(
                    [executable, *command.argv[1:]], env=environment, cwd=self.folder, stdout=said, stderr=said,
                    start_new_session=True,
                ))  # fmt: skip
                said.close()
            for command, process in zip(commands, processes, strict=True):
                self._wait(health[command.argv[0]], process, command.argv[0])
            yield
        finally:
            for process in processes:
                os.killpg(process.pid, signal.SIGTERM)
            for process in processes:
                process.wait(60)

    def _wait(self, url: str, process: subprocess.Popen[bytes], name: str) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            try:
                if requests.get(url, timeout=5).ok:
                    return
            except requests.RequestException:
                pass
            log = (self.folder / f"{name}.log").read_text(errors="replace")
            assert process.poll() is None, f"{name} has ended: {log[-2000:]}"
            assert time.monotonic() < deadline, f"{name} does not start: {log[-2000:]}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def servers(
    cluster: Cluster, s3: S3, recorded_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """Both, with the environment of their clients."""
    folder = tmp_path_factory.mktemp("servers")
    home = copied(recorded_home, folder / "home")
    for name in ("mlflow", "prefect"):
        cluster.database(name)
    s3.client().create_bucket(Bucket=BUCKET)
    made = Servers(cluster, s3, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_PIPELINE_HOME", str(home))
        patch.chdir(folder)
        for name, value in (made.environment | {"PREFECT_HOME": str(folder / "prefect")}).items():
            patch.setenv(name, value)
        commands = (services.mlflow_server(made.settings), services.prefect_server(made.settings))
        with made.running(*commands):
            yield made


@pytest.fixture(scope="module")
def evaluations(servers: Servers) -> list[Any]:
    """Of the four versions in the home's own MLflow."""
    own = settings_of(servers.folder / "home")
    return [registry.recorded_evaluation(registry.run_of_version(NAME, str(n), own), own) for n in range(1, 5)]


def versions(settings: Settings) -> list[str]:
    return sorted(str(one.version) for one in connect(settings).search_model_versions(f"name = '{NAME}'"))


def finished(settings: Settings) -> list[Any]:
    client = connect(settings)
    experiment = find_experiment(client, settings)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_no_password_stands_on_a_command_line(servers: Servers) -> None:
    commands = (services.mlflow_server(servers.settings), services.prefect_server(servers.settings))
    words = [word for command in commands for word in command.argv]
    assert not [word for word in words if QUOTED in word or PASSWORD in word or "postgresql" in word]
    assert DATABASE_VARIABLE in os.environ


def test_a_run_is_recorded_read_back_and_promoted(servers: Servers, evaluations: list[Any]) -> None:
    run = record(SPEC, evaluations[0], servers.settings, {})
    assert run.version == "1"
    assert registry.recorded_evaluation(run.run_id, servers.settings) == evaluations[0]
    folder = registry.download_projector("challenger", NAME, servers.settings)  # its digest is checked
    assert (folder / "MANIFEST.json").exists() or any(folder.iterdir())
    promotion.promote(NAME, "1", None, servers.settings, who="test", why="the first one")
    assert registry.aliases(NAME, servers.settings)["champion"] == "1"
    objects = servers.s3.objects(BUCKET)
    assert all(key.startswith(f"{PREFIX_OF_RUNS}/") for key in objects)
    assert any(key.endswith(f"{run.run_id}/artifacts/evaluation/evaluation.json") for key in objects)
    assert servers.cluster.query("SELECT count(*) FROM runs", "mlflow") == "1"


def test_postgresql_restarted_in_the_middle_of_recording_leaves_one_whole_run_and_one_version(
    servers: Servers, evaluations: list[Any]
) -> None:
    """As a stage is tried again that met an outage, so is this; the flow run's tag makes it one run."""
    before_runs, before = len(finished(servers.settings)), versions(servers.settings)
    tags, began, outcome = {"prefect.flow_run_id": "a-night"}, threading.Event(), []

    def recording() -> None:
        for _ in range(6):
            began.set()
            try:
                outcome.append(record(SPEC, evaluations[1], servers.settings, tags))
                return
            except Exception as error:
                outcome.append(error)
                time.sleep(1)

    thread = threading.Thread(target=recording)
    thread.start()
    began.wait()
    deadline = time.monotonic() + 30
    while len(finished(servers.settings)) == before_runs and time.monotonic() < deadline:
        time.sleep(0.05)  # until the run is begun
    assert thread.is_alive()
    servers.cluster.control("restart")
    thread.join(120)
    run = outcome[-1]
    assert not isinstance(run, BaseException), outcome
    assert versions(servers.settings) == [*before, run.version]
    ours = [one for one in finished(servers.settings) if one.data.tags.get("prefect.flow_run_id") == "a-night"]
    assert [(one.info.run_id, one.info.status) for one in ours] == [(run.run_id, "FINISHED")]
    assert registry.recorded_evaluation(run.run_id, servers.settings) == evaluations[1]
    points = connect(servers.settings).get_metric_history(run.run_id, "train/loss")
    assert [point.step for point in points] == [1, 2]


def of(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


def test_prefect_on_postgresql_takes_a_flow_run_and_the_doctor_finds_what_is_missing(servers: Servers) -> None:
    from prefect import flow
    from prefect.settings import PREFECT_API_URL, temporary_settings

    @flow(name="night")
    def night() -> int:
        return 7

    with temporary_settings({PREFECT_API_URL: servers.api}):
        assert night() == 7
    assert servers.cluster.query("SELECT state_name FROM flow_run", "prefect") == "Completed"
    found = of(findings.findings(servers.api))
    assert found["Prefect"].status == found["Prefect's version"].status == "ok"
    missing = {name for name, finding in found.items() if finding.status == "problem"}
    assert missing == {"work pool", "deployments", "limit", "automations"}
    assert found["notification"].status == "warning"
    assert all(found[name].remedy for name in missing)


def test_the_doctor_is_content_with_what_deploy_makes_and_tells_what_a_person_switched_off(servers: Servers) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import devices, installation

    with temporary_settings({PREFECT_API_URL: servers.api}), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", servers.api)
        installation.deploy("process", "http://127.0.0.1:9/hook")
        with get_client(sync_client=True) as client:
            assert of(findings.findings(servers.api))["work pool"].found.endswith("has no worker that is online")
            client.send_worker_heartbeat(services.POOL, "a worker")
            found = of(findings.findings(servers.api))
            assert {name: one.found for name, one in found.items() if one.status != "ok"} == {}
            assert "0 2 * * *" in found["schedule"].found
            (limit, *_) = devices.devices()
            client.update_global_concurrency_limit(limit, GlobalConcurrencyLimitUpdate(limit=3))
            automation = next(one for one in client.read_automations() if one.name.startswith(PREFIX))
            client.pause_automation(automation.id)
            found = of(findings.findings(servers.api))
    assert {name for name, one in found.items() if one.status == "problem"} == {"limit", "automations"}
    assert found["limit"].found == f"{limit} is 3"
    assert automation.name.removeprefix(PREFIX) in found["automations"].found


def facts(url: str) -> dict[str, list[Any]]:
    """Rows of the tables that tell most, in order."""
    asked = {
        "mlflow": (
            "SELECT run_uuid, status, artifact_uri FROM runs ORDER BY 1",
            "SELECT key, value, run_uuid FROM params ORDER BY 3, 1",
            "SELECT key, value, step, run_uuid FROM metrics ORDER BY 4, 1, 3",
            "SELECT name, version, run_id, source FROM model_versions ORDER BY 2",
            "SELECT name, alias, version FROM registered_model_aliases ORDER BY 2",
        ),
        "prefect": (
            "SELECT id, name, state_name FROM flow_run WHERE state_type != 'SCHEDULED' ORDER BY 1",
            "SELECT id, name FROM deployment ORDER BY 1",
            'SELECT name, "limit" FROM concurrency_limit_v2 ORDER BY 1',
            "SELECT name, enabled FROM automation ORDER BY 1",
        ),
    }
    kind = "prefect" if "prefect" in url else "mlflow"
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return {query: [tuple(row) for row in connection.execute(text(query))] for query in asked[kind]}


def test_both_databases_and_the_bucket_are_backed_up_while_servers_run_and_restored_elsewhere_and_in_place(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this file: afterwards the servers' databases have other contents than they know."""
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path / "home"))
    cluster, folder = servers.cluster, tmp_path / "backup"
    before = {name: facts(cluster.url(name)) for name in ("mlflow", "prefect")}
    assert len(before["mlflow"]["SELECT run_uuid, status, artifact_uri FROM runs ORDER BY 1"]) >= 2
    objects = servers.s3.objects(BUCKET)
    manifest = backup.make(folder, load_settings())
    told = (folder / "MANIFEST.json").read_text()
    assert PASSWORD not in told
    assert QUOTED not in told
    assert {f"{PREFIX_OF_RUNS}/{name}": one.num_bytes for name, one in manifest.objects.items()} == objects
    with pytest.raises(BackupRefused, match="is in use by"):
        restore.put_back(folder, load_settings(), replace=True)

    for name in ("mlflow", "prefect"):
        cluster.database(f"{name}-other")
    servers.s3.client().create_bucket(Bucket="other")
    monkeypatch.setenv(DATABASE_VARIABLE, cluster.url("mlflow-other"))
    monkeypatch.setenv(databases.PREFECT_VARIABLE, cluster.url("prefect-other", "+asyncpg"))
    monkeypatch.setenv(ARTIFACTS_VARIABLE, "s3://other/runs")
    assert restore.put_back(folder, load_settings(), replace=False).aside == ()
    assert {name: facts(cluster.url(f"{name}-other")) for name in ("mlflow", "prefect")} == before
    assert servers.s3.objects("other") == objects

    with create_engine(cluster.url("mlflow-other"), poolclass=NullPool).begin() as connection:
        connection.execute(text("DELETE FROM registered_model_aliases"))
    with pytest.raises(BackupRefused, match="say --replace"):
        restore.put_back(folder, load_settings(), replace=False)
    done = restore.put_back(folder, load_settings(), replace=True)
    assert {name: facts(cluster.url(f"{name}-other")) for name in ("mlflow", "prefect")} == before
    assert len(done.aside) == 3
    moved = {key for key in servers.s3.objects("other") if key.startswith("runs.before-restore-")}
    assert len(moved) == len(objects)
