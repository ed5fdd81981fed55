"""The champion is asked again: real versions of the pocket projector, real MLflow, Prefect and serving."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from flows.champion import evaluate_champion
from llava_pipeline.contracts import Differences, Scored
from llava_pipeline.errors import Regressed
from llava_pipeline.stages import regression
from llava_pipeline.tracking import registry
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.settings import FILE_VARIABLE, Settings, load_settings
from tests.serving.served import NAME, Served, point, served_home, shared_server, trained_home
from tests.tracking.test_run import compare, documented, files

__all__ = ["served_home", "shared_server", "trained_home"]


@pytest.fixture
def settings(served_home: Path, shared_server: Served, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a home of this test alone, with a server that serves version 1 from another one."""
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(served_home))
    return serving_at(f"{shared_server.url}/readyz", served_home, monkeypatch)


def serving_at(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    path = home / "mlflow.yml"
    path.write_text(json.dumps({"serving": {"ready_url": url, "timeout_seconds": 2}}), encoding="utf-8")
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    return load_settings()


def newest_flow_run() -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)[0]


def page_of(run: FlowRun) -> str:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    # Once: but a client that heard no answer in time asks again, and then there are two of the same.
    (page,) = {str(artifact.data) for artifact in found if artifact.key == "champion-check"}
    return page


def tags_of(version: str, settings: Settings) -> dict[str, str]:
    return dict(connect(settings).get_model_version(NAME, version).tags)


def artifacts_of(version: str, settings: Settings) -> Path:
    """The folder in which MLflow keeps the files of the run of a version."""
    run = connect(settings).get_run(registry.run_of_version(NAME, version, settings))
    return Path(str(run.info.artifact_uri).removeprefix("file://"))


def forge_what_is_remembered(home: Path) -> None:
    """Let every answer that is kept under its digest be that of another projector."""
    kept = sorted((home / "cache" / "scores").glob("*.json"))
    scored = [Scored.model_validate_json(path.read_text(encoding="utf-8")) for path in kept]
    assert len({one.lines.digest for one in scored}) == len(scored) > 1
    for path, one, other in zip(kept, scored, [*scored[1:], scored[0]], strict=True):
        path.write_text(one.model_copy(update={"lines": other.lines}).model_dump_json(), encoding="utf-8")


def test_a_champion_that_answers_as_recorded_is_asked_anew_and_noted_with_the_version(
    served_home: Path, settings: Settings
) -> None:
    forge_what_is_remembered(served_home)
    check = evaluate_champion("pocket")
    assert check is not None
    found = check.differences
    assert found is not None
    assert (found.num_questions, found.changed_share) == (60, 0.0)
    assert found.likelihood == pytest.approx(found.likelihood_recorded, abs=1e-6)
    assert "as recorded" in check.serving
    assert "reports version 1 and answers" in check.serving
    run, tags = connect(settings).get_run(check.run_id), tags_of("1", settings)
    assert (run.info.status, run.data.tags["llava.kind"], run.data.tags["llava.check"]) == (
        "FINISHED", "check", "as recorded",
    )  # fmt: skip
    assert run.data.metrics["check/likelihood"] == found.likelihood
    assert (tags["llava.checked"], tags["llava.checked_in"]) == ("as recorded", check.run_id)
    flow_run = newest_flow_run()
    assert run.data.tags["prefect.flow_run_id"] == str(flow_run.id)
    assert "| likelihood |" in page_of(flow_run)
    own = {key for key in run.data.tags if key.startswith("llava.check")} | set(run.data.metrics)
    own |= {"llava.kind", *files("", connect(settings), check.run_id)}
    own |= {key for key in tags if key.startswith("llava.checked")}
    assert compare(own, documented("Checks of the champion")) == (set(), set())


def test_a_champion_that_answers_otherwise_fails_the_flow_by_name_and_is_noted(
    served_home: Path, settings: Settings
) -> None:
    folder = artifacts_of("1", settings) / "evaluation"
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines[:3]:
        line["answer"] = "something else"
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(Regressed, match=r"5.0% of 60 answers are other ones than recorded"):
        evaluate_champion("pocket")
    flow_run = newest_flow_run()
    assert flow_run.state_name == "Failed"
    assert "Regressed" in str(flow_run.state and flow_run.state.message)
    assert "## What is wrong" in page_of(flow_run)
    tags = tags_of("1", settings)
    assert tags["llava.checked"].startswith("5.0% of 60 answers")
    run = connect(settings).get_run(tags["llava.checked_in"])
    assert (run.info.status, run.data.tags["llava.failure"]) == ("FAILED", tags["llava.checked"])


def test_a_champion_that_cannot_be_loaded_any_more_has_regressed(served_home: Path, settings: Settings) -> None:
    (artifacts_of("1", settings) / "projector" / "projector.safetensors").write_bytes(b"damaged")
    shutil.rmtree(served_home / "cache" / "projectors", ignore_errors=True)
    with pytest.raises(Regressed, match=r"could not be asked: the projector of run .* is not the one"):
        evaluate_champion("pocket")
    assert tags_of("1", settings)["llava.checked"].startswith("it could not be asked")


def test_where_there_is_no_champion_the_flow_completes_and_says_so(served_home: Path, settings: Settings) -> None:
    connect(settings).delete_registered_model_alias(NAME, "champion")
    assert evaluate_champion("pocket") is None
    flow_run = newest_flow_run()
    assert flow_run.state_name == "Completed"
    assert "has no champion yet" in page_of(flow_run)


def asked_of_serving(settings: Settings) -> tuple[str, str | None]:
    champion = registry.champion(NAME, settings)
    assert champion is not None
    return regression.ask_serving(champion, NAME)


def test_serving_that_reports_another_version_than_the_alias_is_a_problem(
    served_home: Path, settings: Settings
) -> None:
    point(served_home, "champion", "2")  # the server looks at another home
    _, wrong = asked_of_serving(settings)
    assert wrong is not None
    assert "still reported version 1 after 2 s, not version 2" in wrong


def test_serving_that_answers_a_golden_question_otherwise_is_a_problem(served_home: Path, settings: Settings) -> None:
    path = artifacts_of("1", settings) / "evaluation" / "golden" / "questions.json"
    golden = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps([golden[0] | {"answer": "a zebra"}]), encoding="utf-8")
    _, wrong = asked_of_serving(settings)
    assert wrong is not None
    assert f"which answers {golden[0]['answer']!r}" in wrong
    assert "'a zebra' was recorded" in wrong


class Locked(BaseHTTPRequestHandler):
    """Tells who it is, and answers nobody without a key."""

    told: dict[str, Any] = {"model": NAME, "version": "1"}

    def do_GET(self) -> None:
        body = json.dumps(self.told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Locked)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/readyz"
    server.shutdown()
    thread.join()
    server.server_close()


def test_serving_that_wants_a_key_is_said_and_no_problem(
    served_home: Path, settings: Settings, locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, wrong = asked_of_serving(serving_at(locked, served_home, monkeypatch))
    assert wrong is None
    assert "reports version 1; it asks for a key" in told
    monkeypatch.setattr(Locked, "told", {"model": "llava-projector-other", "version": "9"})
    told, wrong = asked_of_serving(settings)
    assert wrong is None
    assert "serves llava-projector-other, not llava-projector-pocket" in told


def difference(**changes: Any) -> Differences:
    same = {"exact_match": 0.9, "likelihood": 0.8, "grounding_gain": 1.5}
    recorded = {f"{key}_recorded": value for key, value in same.items()}
    return Differences.model_validate({"num_questions": 1000, "changed_share": 0.0, **same, **recorded, **changes})


@pytest.mark.parametrize(
    ("changes", "regressed"),
    [
        ({"likelihood": 0.8 - 9e-5, "grounding_gain": 1.5 - 8e-4}, False),  # measured: bfloat16 beside float32
        ({"likelihood": 0.797}, True),
        ({"likelihood": 0.803}, True),  # better is another projector, too
        ({"likelihood": float("nan")}, True),
        ({"changed_share": 0.005}, False),
        ({"changed_share": 0.006}, True),
        ({"num_questions": 20, "changed_share": 0.05}, False),  # one answer
        ({"num_questions": 20, "changed_share": 0.1}, True),
        ({"grounding_gain": 1.48}, True),
        ({"grounding_gain": None}, False),
    ],
)
def test_what_another_machine_explains_is_allowed_and_nothing_more(changes: dict[str, Any], regressed: bool) -> None:
    problems = regression.too_much(difference(**changes), regression.TOLERANCES["float32"])
    assert bool(problems) == regressed
