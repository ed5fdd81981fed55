"""MLflow away: a server that is killed while steps arrive and while a run is recorded, and answers that are lost.

Nothing is lost: every step's point is there. Nothing is there twice: one run, one version, each point, data set and row
of a table once.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from llava_pipeline.contracts import Evaluation, RecordedRun
from llava_pipeline.errors import TrackingUnavailable
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import content, live, registry
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.live import Live
from llava_pipeline.tracking.run import record
from llava_pipeline.tracking.settings import URI_VARIABLE, Settings, TrackingSettings
from tests.flows.conftest import prefect_server
from tests.tracking.conftest import MakeEvaluation
from tests.tracking.server import Server

__all__ = ["prefect_server"]
STARTED = 1_795_509_060.0
CURVES = [
    f"train/{name}"
    for name in (
        *("loss", "learning_rate", "grad_norm", "samples_per_second", "tokens_per_second", "held_out_loss", "mfu"),
        *("useful_flops_per_second", "data_wait_share", "tokens_per_pass", "peak_memory_bytes", "cost"),
    )
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated_database, folder / "mlflow.db")
    served = Server(folder)
    served.start()
    yield served
    served.back()
    served.kill()


@contextmanager
def at_call(server: Server, name: str, before: bool, seconds: float) -> Iterator[None]:
    """Take the server away at the first call of a method of the client: before its request, or after its answer."""
    carry_out, first = getattr(MlflowClient, name), iter([True])

    def call(*args: Any, **kwargs: Any) -> Any:
        now = next(first, False)
        if now and before:
            server.away(seconds)
        done = carry_out(*args, **kwargs)
        if now and not before:
            server.away(seconds)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, name, call)
        yield


def until_recorded(attempt: Callable[[], RecordedRun], tries: int = 40) -> RecordedRun:
    """Try again what may pass, as the stage does."""
    for _ in range(tries):
        try:
            return attempt()
        except TrackingUnavailable:
            time.sleep(1)
    raise AssertionError(f"not recorded after {tries} attempts")


def assert_all_there_once(
    settings: Settings, recorded: RecordedRun, evaluation: Evaluation, tags: dict[str, str]
) -> None:
    client = connect(settings)
    asked = f"tags.`prefect.flow_run_id` = '{tags['prefect.flow_run_id']}'"
    runs = client.search_runs([recorded.experiment_id], filter_string=asked)
    assert [run.info.run_id for run in runs] == [recorded.run_id]
    assert (runs[0].info.status, runs[0].data.tags.get("llava.failure")) == ("FINISHED", None)
    versions = client.search_model_versions(f"name = '{recorded.registered_model}'")
    assert [(v.run_id, str(v.version)) for v in versions] == [(recorded.run_id, recorded.version)]
    assert client.get_registered_model(recorded.registered_model).aliases == {"challenger": recorded.version}
    assert points(client, recorded.run_id) == expected_points(evaluation)
    results = content.results(evaluation).keys() - set(CURVES)
    assert {key: len(client.get_metric_history(recorded.run_id, key)) for key in results} == dict.fromkeys(results, 1)
    inputs = runs[0].inputs.dataset_inputs
    assert sorted(tag.value for one in inputs for tag in one.tags) == ["evaluation", "training"]
    rows = len(content.read_rows(answers(evaluation)))
    assert num_rows(client, recorded.run_id, "evaluation/answers.json") == rows
    assert num_rows(client, recorded.run_id, "evaluation/samples.json") <= 36
    assert runs[0].data.tags["mlflow.loggedArtifacts"].count("answers.json") == 1


def answers(evaluation: Evaluation) -> Path:
    from llava_pipeline import store

    return store.open_artifact(evaluation.answers) / "answers.jsonl"


def num_rows(client: MlflowClient, run_id: str, table: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = client.download_artifacts(run_id, table, folder)
        return len(json.loads(Path(path).read_text(encoding="utf-8"))["data"])


def points(client: MlflowClient, run_id: str) -> Counter[tuple[str, int, float]]:
    """How many times each point of the curves is there."""
    keys = [key for key in client.get_run(run_id).data.metrics if key in CURVES]
    return Counter((key, one.step, one.value) for key in keys for one in client.get_metric_history(run_id, key))


def expected_points(evaluation: Evaluation) -> Counter[tuple[str, int, float]]:
    curve = content.training_curve(content.read_rows(content.history(evaluation)), STARTED)
    return Counter((point.key, point.step, point.value) for point in curve)


# --------------------------------------------------------------------------------------------- killed and back


@pytest.mark.slow
def test_killed_while_steps_arrive_and_at_a_registration_nothing_is_lost_or_twice(
    spec: RunSpec, make_evaluation: MakeEvaluation, server: Server
) -> None:
    """One run trains while another one is registered: the server dies behind the new version."""
    trains, registers = (spec.model_copy(update={"profile": name}) for name in ("trains", "registers"))
    trained, finished = make_evaluation(num_steps=400), make_evaluation(num_steps=40, weights=b"others")
    tags, other = {"prefect.flow_run_id": "trains"}, {"prefect.flow_run_id": "registers"}
    sender, most = Live(trains, server.settings, tags, STARTED, seconds_between=0.1), 0

    def train() -> None:
        nonlocal most
        for row in content.read_rows(content.history(trained)):
            sender(row | {"event": "step"})
            most = max(most, len(sender.waiting))
            time.sleep(0.04)

    training = threading.Thread(target=train)
    training.start()
    while sender.run_id is None or sender.waiting:
        time.sleep(0.05)
    with at_call(server, "create_model_version", before=False, seconds=5):
        recorded = until_recorded(lambda: record(registers, finished, server.settings, other, started=STARTED))
    training.join()
    server.back()
    assert server.outages[-1] > 5
    assert most > 100  # they waited; how many, depends on the machine
    deadline = time.monotonic() + 30
    while sender.waiting and time.monotonic() < deadline:
        time.sleep(0.05)
    sender.close()
    assert_all_there_once(server.settings, recorded, finished, other)
    assert points(connect(server.settings), sender.run_id) == expected_points(trained)  # before it is recorded
    recorded = record(trains, trained, server.settings, tags, started=STARTED)
    assert recorded.run_id == sender.run_id
    assert_all_there_once(server.settings, recorded, trained, tags)


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "name", ["log_batch", "log_inputs", "log_artifacts", "log_dict", "create_model_version", "set_terminated"]
)
def test_killed_anywhere_while_it_is_recorded_there_is_one_run_and_one_version(
    spec: RunSpec, make_evaluation: MakeEvaluation, server: Server, name: str, before: bool
) -> None:
    about = f"{name.replace('_', '-')}-{'before' if before else 'after'}"
    spec, tags = spec.model_copy(update={"profile": about}), {"prefect.flow_run_id": about}
    evaluation, count = make_evaluation(num_steps=40), len(server.outages)
    with at_call(server, name, before, seconds=2):
        recorded = until_recorded(lambda: record(spec, evaluation, server.settings, tags, started=STARTED))
    server.back()
    assert len(server.outages) == count + 1
    assert_all_there_once(server.settings, recorded, evaluation, tags)


# --------------------------------------------------------------------------------------------- lost answers


class Lossy:
    """A proxy that carries a request out and loses its answer, once: what a server does that dies in that moment."""

    def __init__(self, port: int) -> None:
        lossy, self.sign, self.lost = self, "", 0

        class Handler(BaseHTTPRequestHandler):
            def carry_out(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                behind = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                behind.request(self.command, self.path, body, dict(self.headers))
                answer = behind.getresponse()
                told = answer.read()
                behind.close()
                if lossy.sign and lossy.sign == f"{self.command} {self.path.partition('?')[0].partition('mlflow/')[2]}":
                    lossy.sign, lossy.lost = "", lossy.lost + 1
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(answer.status)
                for key, value in answer.getheaders():
                    if key.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                        self.send_header(key, value)
                self.send_header("content-length", str(len(told)))
                self.end_headers()
                self.wfile.write(told)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = carry_out  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.settings = Settings(tracking=TrackingSettings(uri=f"http://127.0.0.1:{self.server.server_port}"))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def lossy(server: Server) -> Iterator[Lossy]:
    server.back()
    proxy = Lossy(server.port)
    yield proxy
    proxy.server.shutdown()
    proxy.server.server_close()


@pytest.mark.parametrize(
    "request_",
    [
        "POST runs/create",
        "POST model-versions/create",
        "POST runs/log-batch",
        *(
            pytest.param(f"POST {path}", marks=pytest.mark.slow)
            for path in (
                *("runs/log-inputs", "runs/set-tag", "runs/update"),
                *("registered-models/create", "registered-models/alias"),
            )
        ),
    ],
)
def test_an_answer_that_is_lost_leaves_nothing_twice(
    spec: RunSpec, make_evaluation: MakeEvaluation, lossy: Lossy, request_: str
) -> None:
    about = request_.split()[1].replace("/", "-")
    spec, tags = spec.model_copy(update={"profile": about}), {"prefect.flow_run_id": about}
    evaluation = make_evaluation(num_steps=5)
    connect(lossy.settings)
    lossy.sign = request_
    recorded = until_recorded(lambda: record(spec, evaluation, lossy.settings, tags, started=STARTED))
    assert lossy.lost == 1
    assert_all_there_once(lossy.settings, recorded, evaluation, tags)


# --------------------------------------------------------------------------------------------- between two requests

AWAY = "API request failed with exception: connection refused"  # as MLflow's client tells it


def fails_once(patch: pytest.MonkeyPatch, name: str, when: Callable[..., bool]) -> None:
    """Let one call of the client fail as it does where the server is away."""
    carry_out, first = getattr(MlflowClient, name), [True]

    def call(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        if first and when(*args):
            first.clear()
            raise MlflowException(AWAY)
        return carry_out(self, *args, **kwargs)

    patch.setattr(MlflowClient, name, call)


def test_a_table_that_was_written_but_not_listed_is_listed_by_the_next_attempt(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags, evaluation = {"prefect.flow_run_id": "listed"}, make_evaluation()
    fails_once(monkeypatch, "set_tag", lambda run_id, key, *_: key == "mlflow.loggedArtifacts")
    with pytest.raises(TrackingUnavailable):
        record(spec, evaluation, settings, tags, started=STARTED)
    recorded = record(spec, evaluation, settings, tags, started=STARTED)
    listed = json.loads(connect(settings).get_run(recorded.run_id).data.tags["mlflow.loggedArtifacts"])
    assert sorted(one["path"] for one in listed) == ["evaluation/answers.json", "evaluation/samples.json"]


def test_the_load_of_the_machine_that_waits_at_the_end_is_not_lost(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags, evaluation = {"prefect.flow_run_id": "load"}, make_evaluation()
    sender = Live(spec, settings, tags, STARTED, seconds_between=0.05)
    sender({"event": "training", "id": "a"})
    while sender.run_id is None or sender.waiting:
        time.sleep(0.05)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: (_ for _ in ()).throw(MlflowException(AWAY)))
        with sender.lock:
            sender.waiting.append(content.Point("system/cpu_utilization_percentage", 50.0, 77, STARTED + 77))
        sender.close()
    recorded = record(spec, evaluation, settings, tags, started=STARTED)
    sender.thread.join(30)
    history = connect(settings).get_metric_history(recorded.run_id, "system/cpu_utilization_percentage")
    assert 77 in [point.step for point in history]


def test_a_run_whose_beginning_hangs_until_recording_has_its_turn_is_not_begun_twice(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags, evaluation, go_on = {"prefect.flow_run_id": "hangs"}, make_evaluation(), threading.Event()
    carry_out, hangs = MlflowClient.create_run, threading.Event()

    def create_run(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == "mlflow-live":
            hangs.set()
            go_on.wait(60)
        return carry_out(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_run", create_run)
    monkeypatch.setattr(live, "SECONDS_TO_FINISH", 0.1)
    sender = Live(spec, settings, tags, STARTED, seconds_between=0.05)
    sender({"event": "training", "id": "a"})
    assert hangs.wait(60)
    sender.close()
    recorded = record(spec, evaluation, settings, tags, started=STARTED)
    go_on.set()
    sender.thread.join(60)
    runs = connect(settings).search_runs([recorded.experiment_id])
    assert [run.info.run_id for run in runs] == [recorded.run_id]


# --------------------------------------------------------------------------------------------- a minute, twice


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_minute_away_in_the_middle_of_a_run_and_another_at_registration(
    server: Server, prefect_server: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real flow with its own retries, against a real server."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    from flows.train import train
    from llava_pipeline.spec import load_spec

    server.back()
    began, count = time.monotonic(), len(server.outages)
    monkeypatch.setenv(URI_VARIABLE, str(server.settings.tracking.uri))
    monkeypatch.setenv("PREFECT_LOCAL_STORAGE_PATH", str(home / "results"))
    budget = ("training.max_steps=100000", "training.max_minutes=2", "training.samples_per_step=256")
    client, seen = connect(server.settings), []

    def once_steps_have_arrived() -> None:
        while not seen:
            time.sleep(0.5)
            for run in client.search_runs(["1"], filter_string="attributes.run_name LIKE 'tiny-%'", max_results=1):
                seen.extend(client.get_metric_history(run.info.run_id, "train/loss"))
        server.away(60)

    watching = threading.Thread(target=once_steps_have_arrived, daemon=True)
    watching.start()
    with at_call(server, "create_model_version", before=True, seconds=60):
        verdict = train(load_spec("tiny", budget))
    server.back()
    assert len(server.outages) == count + 2
    assert min(server.outages[-2:]) > 60
    run = client.get_run(verdict.run_id)
    tags = {"prefect.flow_run_id": run.data.tags["prefect.flow_run_id"]}
    evaluation = registry.recorded_evaluation(verdict.run_id, server.settings)
    recorded = RecordedRun(
        run_id=verdict.run_id, experiment_id=run.info.experiment_id, registered_model=verdict.registered_model,
        version=verdict.version, evaluation=evaluation,
    )  # fmt: skip
    steps = evaluation.projector.num_steps
    assert len(seen) < steps
    assert_all_there_once(server.settings, recorded, evaluation, tags)
    assert registry.aliases(verdict.registered_model, server.settings) == {"challenger": verdict.version}
    with get_client(sync_client=True) as prefect:
        of_flow_run = FlowRunFilter(id=FlowRunFilterId(any_=[tags["prefect.flow_run_id"]]))
        tasks = {task.name.rsplit("-", 1)[0]: task for task in prefect.read_task_runs(flow_run_filter=of_flow_run)}
    assert tasks["record-run"].run_count > 1  # the stage's own retries
    print(
        f"{steps} steps, {len(seen)} before the outage; outages {[round(one, 1) for one in server.outages[-2:]]} s; "
        f"record ran {tasks['record-run'].run_count} times; {time.monotonic() - began:.0f} s in all"
    )
