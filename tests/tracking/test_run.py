"""What a recorded run holds, read back from a real MLflow."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_pipeline import store
from llava_pipeline.contracts import Beginning, Evidence, Inspection
from llava_pipeline.errors import MissingArtifact, TrackingError
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import content, promotion, registry, verdict
from llava_pipeline.tracking.client import check_reachable, connect, ensure_experiment
from llava_pipeline.tracking.gate import decide
from llava_pipeline.tracking.live import Live
from llava_pipeline.tracking.run import record, record_failure
from llava_pipeline.tracking.settings import Settings, TrackingSettings
from tests.tracking.conftest import NUM_STEPS, MakeEvaluation

DOCS = Path(__file__).parents[2] / "docs" / "tracking.md"


def documented(heading: str) -> set[str]:
    """Names in the first column of the table below a heading."""
    section = DOCS.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


def compare(logged: set[str], names: set[str]) -> tuple[set[str], set[str]]:
    """Logged names that are not documented, and documented names that were not logged; ``<x>`` stands for anything."""
    plain = {name for name in names if "<" not in name}
    patterns = {name: re.compile(re.sub(r"<\w+>", ".+", re.escape(name))) for name in names - plain}
    unknown = {n for n in logged - plain if not any(p.fullmatch(n) for p in patterns.values())}
    unused = {name for name, p in patterns.items() if not any(p.fullmatch(n) for n in logged)}
    return unknown, (plain - logged) | unused


def files(folder: str, client: object, run_id: str) -> Iterator[str]:
    """Every artifact of a run, by path."""
    for item in client.list_artifacts(run_id, folder or None):  # type: ignore[attr-defined]
        if item.is_dir:
            yield from files(item.path, client, run_id)
        else:
            yield item.path


@pytest.fixture
def closed_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def test_every_name_is_documented_and_every_documented_name_is_logged(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings
) -> None:
    one = {"prefect.flow_run_id": "one"}
    watched = Live(spec, settings, one, 1_795_509_060.0, seconds_between=0.05)
    watched({"event": "training", "id": "a"})
    while watched.run_id is None or watched.waiting:
        watched.ending.wait(0.05)
    watched.close()
    fresh = make_evaluation()
    before = Beginning(registered_model="m", version="1", run_id="0" * 32, projector=fresh.projector.projector)
    went_on = fresh.projector.model_copy(update={"began_with": before})
    recorded = record(spec, fresh.model_copy(update={"projector": went_on}), settings, one)
    own = recorded.evaluation.projector.projector.digest
    evidence = Evidence(inspection=Inspection(problem=None, projector_digest=own), champion=None)
    rules = decide(recorded.evaluation, evidence, None, settings.gate)
    verdict.write(recorded, evidence, rules, settings)
    promotion.promote(recorded.registered_model, recorded.version, None, settings, who="a test", why="a test")
    failed = record_failure(spec, "no space left", settings, {})
    client = connect(settings)
    run = client.get_run(recorded.run_id)
    tags = set(run.data.tags) | set(client.get_run(failed or "").data.tags)
    version = client.get_model_version(recorded.registered_model, recorded.version)

    assert compare(set(run.data.params), documented("Parameters")) == (set(), set())
    metrics = documented("Metrics of every optimizer step") | documented("Metrics of the run")
    assert compare(set(run.data.metrics), metrics) == (set(), set())
    only_in_a_checkout = {"mlflow.source.git.commit", "prefect.flow_run_id", "llava.goes_on_from"}  # or after a kill
    tags_of_a_run = documented("Tags of a run") - only_in_a_checkout
    assert compare(tags - only_in_a_checkout, tags_of_a_run) == (set(), set())
    assert compare(set(version.tags), documented("Tags of a version")) == (set(), set())
    assert compare(set(files("", client, recorded.run_id)), documented("Artifacts")) == (set(), set())
    contexts = {tag.value for given in run.inputs.dataset_inputs for tag in given.tags}
    assert compare(contexts, documented("Data sets")) == (set(), set())
    model = client.get_registered_model(recorded.registered_model)
    assert compare(set(model.tags), documented("Tags of a registered model")) == (set(), set())
    aliases = {settings.registry.champion, settings.registry.challenger, settings.registry.previous}
    assert documented("Aliases") == aliases
    assert documented("Rules of the gate") == {rule.name for rule in rules}


def test_values(spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings, home: Path) -> None:
    evaluation = make_evaluation()
    recorded = record(spec, evaluation, settings, {"prefect.flow_run_id": "abc"}, started=1_795_509_060.0)
    client = connect(settings)
    run = client.get_run(recorded.run_id)
    metrics, params, tags = run.data.metrics, run.data.params, run.data.tags

    assert run.info.status == "FINISHED"
    assert run.info.run_name == "tiny-20261124-083100"
    assert recorded.registered_model == "llava-projector-tiny"
    assert recorded.version == "1"
    assert run.info.artifact_uri.startswith(f"file://{home}/mlartifacts/")
    assert params["params.num_trainable"] == "100"
    assert params["spec.training.max_steps"] == str(NUM_STEPS)
    assert params["spec.backbones.vision_tower.overrides.hidden_size"] == "32"
    assert params["spec.backbones.source"] == "null"
    assert metrics["eval/exact_match/yes_no"] == 0.9
    assert metrics["eval/grounding_gain"] == pytest.approx(1.3)
    assert metrics["data/rejected/too_long"] == 1
    assert metrics["train/samples_per_second"] == 16
    assert tags["llava.frozen_digests_equal"] == "true"
    assert tags["prefect.flow_run_id"] == "abc"
    assert tags["llava.registered_version"] == "1"

    curve = client.get_metric_history(recorded.run_id, "train/loss")
    assert [(point.step, point.value) for point in curve] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert [b.timestamp - a.timestamp for a, b in pairwise(curve)] == [500, 500]
    digests = {given.dataset.digest for given in run.inputs.dataset_inputs}
    assert digests == {rows.digest[:32] for rows in (evaluation.projector.data.rows, evaluation.held_out.rows)}


def test_files_come_back(spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings, tmp_path: Path) -> None:
    recorded = record(spec, make_evaluation(), settings, {})
    folder = Path(connect(settings).download_artifacts(recorded.run_id, "", str(tmp_path)))
    assert RunSpec.model_validate(yaml.safe_load((folder / "spec.yaml").read_text(encoding="utf-8"))) == spec
    table = json.loads((folder / "evaluation" / "answers.json").read_text(encoding="utf-8"))
    assert table["columns"][:5] == ["id", "kind", "question", "truth", "answer"]
    assert [row[table["columns"].index("loss")] for row in table["data"]] == [0.1, None]
    shown = json.loads((folder / "evaluation" / "samples.json").read_text(encoding="utf-8"))
    pictures = [row[shown["columns"].index("picture")] for row in shown["data"]]
    assert [(folder / picture["filepath"]).is_file() for picture in pictures] == [True, True]
    assert (folder / "evaluation" / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "projector" / "projector.safetensors").read_bytes() == b"weights"


LAST_WRITES = (
    "log_batch", "log_inputs", "log_text", "log_artifact", "log_artifacts", "log_dict", "create_registered_model",
    "create_model_version", "set_registered_model_alias", "set_tag", "set_terminated",
)  # fmt: skip


@pytest.mark.parametrize("write", LAST_WRITES)
def test_an_answer_that_was_lost_costs_a_retry_and_nothing_is_there_twice(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    from mlflow import MlflowClient

    carry_out = getattr(MlflowClient, write)
    lost: list[str] = []

    def lose_the_answer(*args: Any, **kwargs: Any) -> Any:
        done = carry_out(*args, **kwargs)
        if not lost:
            lost.append(write)
            raise ConnectionError("cut off")
        return done

    evaluation, tags = make_evaluation(), {"prefect.flow_run_id": "one"}
    monkeypatch.setattr(MlflowClient, write, lose_the_answer)
    with pytest.raises(ConnectionError):
        record(spec, evaluation, settings, tags, started=1_795_509_060.0)
    recorded = record(spec, evaluation, settings, tags, started=1_795_509_060.0)
    client = connect(settings)
    (run,) = client.search_runs([recorded.experiment_id])
    assert (run.info.run_id, run.info.status) == (recorded.run_id, "FINISHED")
    assert "llava.failure" not in run.data.tags
    (version,) = client.search_model_versions(f"name = '{recorded.registered_model}'")
    assert str(version.version) == recorded.version == run.data.tags["llava.registered_version"]
    assert len(run.inputs.dataset_inputs) == 2
    for name in ("answers", "samples"):
        table = client.download_artifacts(recorded.run_id, f"evaluation/{name}.json")
        assert len(json.loads(Path(table).read_text(encoding="utf-8"))["data"]) == 2
    assert len(client.get_metric_history(recorded.run_id, "train/loss")) == NUM_STEPS
    assert len(client.get_metric_history(recorded.run_id, "eval/exact_match")) == 1


def test_each_recording_is_a_run_and_a_version(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings
) -> None:
    first = record(spec, make_evaluation(), settings, {})
    second = record(spec, make_evaluation(), settings, {})
    assert first.run_id != second.run_id
    assert (first.version, second.version) == ("1", "2")
    client = connect(settings)
    digests = [client.get_run(r.run_id).data.tags["llava.evaluation_digest"] for r in (first, second)]
    assert digests[0] == digests[1]
    assert registry.aliases(first.registered_model, settings) == {"challenger": "2"}


def test_long_histories_are_sent_in_parts(spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings) -> None:
    recorded = record(spec, make_evaluation(num_steps=450), settings, {})
    assert len(connect(settings).get_metric_history(recorded.run_id, "train/loss")) == 450


def test_nan_is_recorded(spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings) -> None:
    recorded = record(spec, make_evaluation(final_loss=math.nan, loss=math.nan), settings, {})
    assert math.isnan(connect(settings).get_run(recorded.run_id).data.metrics["train/final_loss"])


def test_nothing_global_is_touched(spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    record(spec, make_evaluation(), settings, {})
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == before
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert list(Path.cwd().iterdir()) == []


def test_missing_answers_leave_a_failed_run_and_no_version(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings
) -> None:
    evaluation = make_evaluation()
    folder = store.home() / "store" / evaluation.answers.kind / evaluation.answers.digest
    folder.rename(folder.with_name("gone"))
    with pytest.raises(MissingArtifact, match="run again with --refresh"):
        record(spec, evaluation, settings, {})
    client = connect(settings)
    experiment = client.get_experiment_by_name("llava-pipeline")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert "is not in the store" in run.data.tags["llava.failure"]
    assert registry.aliases(spec.registered_model, settings) == {}


def test_failure_is_recorded(spec: RunSpec, settings: Settings) -> None:
    run_id = record_failure(spec, "the loss became NaN at step 3", settings, {"prefect.flow_run_id": "abc"})
    assert run_id is not None
    run = connect(settings).get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["llava.failure"] == "the loss became NaN at step 3"
    assert run.data.tags["prefect.flow_run_id"] == "abc"
    assert run.data.params["spec.profile"] == "tiny"


def test_unreachable_server_is_one_sentence(
    spec: RunSpec, make_evaluation: MakeEvaluation, closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"http://127.0.0.1:{closed_port}"
    settings = Settings(tracking=TrackingSettings(uri=uri, timeout_seconds=2))
    for attempt in (lambda: check_reachable(settings), lambda: record(spec, make_evaluation(), settings, {})):
        with pytest.raises(TrackingError) as caught:
            attempt()
        message = str(caught.value)
        assert message.startswith(f"MLflow at {uri} does not answer (connection refused")
        assert "start it with `llava-pipeline mlflow-server`" in message
        assert "unset MLFLOW_TRACKING_URI" in message
        assert "\n" not in message
    assert record_failure(spec, "reason", settings, {}) is None
    assert "does not answer" in caplog.text


def test_something_else_on_the_port(spec: RunSpec) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TrackingError, match=r"nothing within 0\.2 s"):
            check_reachable(Settings(tracking=TrackingSettings(uri=uri, timeout_seconds=0.2)))


def test_home_that_cannot_be_written(home: Path) -> None:
    (home / "file").write_text("", encoding="utf-8")
    uri = f"sqlite:///{home}/file/mlflow.db"
    with pytest.raises(TrackingError, match=r"cannot create .*file for MLflow's database \("):
        connect(Settings(tracking=TrackingSettings(uri=uri)))


def test_deleted_experiment(spec: RunSpec, settings: Settings) -> None:
    client = connect(settings)
    client.delete_experiment(client.create_experiment("llava-pipeline"))
    assert record_failure(spec, "reason", settings, {}) is None
    with pytest.raises(TrackingError, match=r"was deleted; restore it with `mlflow experiments restore"):
        ensure_experiment(client, settings)


def test_commit_of_a_checkout_only(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text("", encoding="utf-8")
    assert content.git_commit(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    assert content.git_commit(tmp_path) is None
    git("add", "part.py")
    git("commit", "--quiet", "-m", "one")
    assert content.git_commit(tmp_path) == git("rev-parse", "HEAD")
    ignored = tmp_path / "site-packages"
    ignored.mkdir()
    (ignored / "other.py").write_text("", encoding="utf-8")
    assert content.git_commit(ignored) is None


def test_a_step_without_a_time_stands_where_the_one_before_it_does() -> None:
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "time": 120.0}, {"step": 3, "loss": 1.0}]
    assert [point.time for point in content.training_curve(rows, 100.0)] == [100.0, 120.0, 120.0]
