"""The flow on the tiny profile: real Prefect, real MLflow on SQLite, random weights."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

import flows.stages
from flows.train import train
from llava_pipeline import store
from llava_pipeline.contracts import Verdict
from llava_pipeline.errors import TooManyRejected
from llava_pipeline.spec import RunSpec, load_spec
from llava_pipeline.tracking import listing
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.settings import Settings

STAGES = [
    "fetch-backbones",
    "assemble-and-freeze",
    "find-beginning",
    "validate-stream",
    "train-projector",
    "evaluate-generations",
    "record-run",
    "weigh-against-champion",
    "pass-gate-and-promote",
]
REUSABLE = [*STAGES[:2], *STAGES[3:6]]


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    return load_spec("tiny")


@pytest.fixture(scope="module")
def first(spec: RunSpec, home: Path) -> Verdict:
    """The verdict on a first run."""
    return train(spec)


def task_states(run_id: str) -> dict[str, str]:
    """Name of the last state of every stage of the flow that recorded an MLflow run, by the stage's name."""
    flow_run_id = connect(Settings()).get_run(run_id).data.tags["prefect.flow_run_id"]
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
    below = "validate-pieces-"  # the node of the flow run below the stage, as Prefect names it
    return {run.name.rsplit("-", 1)[0]: run.state_name or "" for run in found if not run.name.startswith(below)}


def test_a_run_is_recorded_registered_and_judged(first: Verdict) -> None:
    row = listing.run(Settings(), first.run_id)
    assert (row["status"], row["version"], row["profile"]) == ("FINISHED", "1", "tiny")
    assert row["frozen_digests_equal"] is True
    assert {"eval/exact_match", "eval/exact_match_shuffled", "eval/exact_match_untrained", "eval/loss"} <= set(
        row["metrics"]
    )
    assert first.decision == "challenger"  # random weights do not pass the gate
    assert row["aliases"] == ["challenger"]


def test_every_stage_shows_in_prefect_under_its_name(first: Verdict) -> None:
    assert sorted(task_states(first.run_id)) == sorted(STAGES)


def test_the_flow_run_links_to_its_mlflow_run_and_back(first: Verdict) -> None:
    run = connect(Settings()).get_run(first.run_id)
    with get_client(sync_client=True) as client:
        flow_run_id = FlowRunFilterId(any_=[run.data.tags["prefect.flow_run_id"]])
        found = client.read_artifacts(flow_run_filter=FlowRunFilter(id=flow_run_id))
    links = [artifact.data for artifact in found if artifact.key == "mlflow-run"]
    assert len(links) == 1
    assert f"/#/experiments/{run.info.experiment_id}/runs/{first.run_id}" in str(links[0])
    assert run.data.tags["prefect.flow_run_url"].endswith(run.data.tags["prefect.flow_run_id"])


def test_a_second_run_reuses_what_did_not_change_and_says_so(
    first: Verdict, spec: RunSpec, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="llava_pipeline.flow"):
        second = train(spec)
    told = [record.getMessage() for record in caplog.records if record.name == "llava_pipeline.flow"]
    assert told == [f"{name}: nothing changed, the earlier result is reused" for name in REUSABLE]
    states = task_states(second.run_id)
    assert {name for name, state in states.items() if state == "Cached"} == set(REUSABLE)
    assert (second.version, second.run_id != first.run_id) == ("2", True)


@pytest.mark.slow
def test_only_what_depends_on_a_change_is_made_anew(first: Verdict, spec: RunSpec) -> None:
    changed = spec.model_copy(update={"training": spec.training.model_copy(update={"max_steps": 3})})
    states = task_states(train(changed).run_id)
    assert {name for name, state in states.items() if state == "Cached"} == {*STAGES[:2], STAGES[3]}


@pytest.mark.slow
def test_an_edit_to_a_stage_s_code_never_returns_a_stale_result(
    first: Verdict, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited, real = "llava_pipeline.stages.train", flows.stages.code_digest
    monkeypatch.setattr(flows.stages, "code_digest", lambda name: real(name) + ("edited" if name == edited else ""))
    states = task_states(train(spec).run_id)
    assert {name for name, state in states.items() if state == "Cached"} == {*STAGES[:2], STAGES[3]}


@pytest.mark.slow
def test_a_reused_result_whose_files_are_gone_is_made_anew(
    first: Verdict, spec: RunSpec, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(home / "store" / "snapshot")
    store._verified.clear()
    with caplog.at_level(logging.INFO, logger="llava_pipeline.flow"):
        again = train(spec)
    assert listing.run(Settings(), again.run_id)["status"] == "FINISHED"
    told = [record.getMessage() for record in caplog.records if record.name == "llava_pipeline.flow"]
    assert any(line.startswith("validate-stream: nothing changed, but snapshot") for line in told)


def test_a_run_that_dies_is_marked_failed_with_the_reason(spec: RunSpec) -> None:
    hopeless = spec.model_copy(update={"data": spec.data.model_copy(update={"max_tokens": 9})})
    with pytest.raises(TooManyRejected, match="too_many_tokens"):
        train(hopeless)
    newest = listing.runs(Settings(), "tiny", 1)[0]
    assert newest["status"] == "FAILED"
    assert "too_many_tokens" in newest["failure"]


def test_nothing_half_written_is_left_in_the_store(first: Verdict, home: Path) -> None:
    folders = [path for path in (home / "store").glob("*/*") if path.is_dir()]
    assert folders
    assert all((path / "MANIFEST.json").is_file() for path in folders)


def test_a_wrong_spec_is_refused_before_any_stage_runs(spec: RunSpec) -> None:
    wrong = spec.model_dump(mode="json")
    wrong["training"]["max_steps"] = 0
    with pytest.raises(Exception, match="max_steps"):
        train(wrong)  # type: ignore[arg-type]


def test_prefect_s_form_has_a_sentence_for_every_value() -> None:
    parameters = train.parameters.definitions or {}
    fields = {
        f"{model}.{name}": field
        for model, schema in parameters.items()
        for name, field in schema.get("properties", {}).items()
        if name != "kind"
    }
    assert len(fields) > 40
    assert [name for name, field in fields.items() if not field.get("description")] == []


def test_the_story_fits_on_one_screen() -> None:
    assert len(Path(flows.stages.__file__).with_name("train.py").read_text(encoding="utf-8").splitlines()) <= 50


@pytest.mark.parametrize("module", ["flows.train", "llava_pipeline.cli"])
def test_importing_loads_neither_torch_nor_mlflow(module: str) -> None:
    heavy = "{'torch', 'mlflow', 'transformers', 'datasets', 'matplotlib'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
