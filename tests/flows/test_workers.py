"""The pieces of a stream, checked by whoever the spec names: real threads, processes and a real Dask cluster."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import prefect
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.settings import PREFECT_API_URL, PREFECT_TASKS_REFRESH_CACHE, temporary_settings

import flows.stages
import flows.workers
from flows.stages import may_change_underneath, show_report, validate_stream
from flows.workers import one_server_for_all, task_runner
from llava_pipeline.contracts import AssembledModel, CheckedPiece, Cursor, Piece, ValidatedData
from llava_pipeline.data.sources import procedural
from llava_pipeline.errors import SourceUnavailable, SpecError, WorkerDied
from llava_pipeline.spec import DataSpec, RunSpec, WorkersSpec, load_spec
from llava_pipeline.stages import assemble, fetch, validate

NUM_HELD_OUT = 24
PIECES = [
    "test scenes/1/test 0-15",
    "test scenes/1/test 16-23",
    "train scenes/1/train 0-15",
    "train scenes/1/train 16-31",
    "train scenes/1/train 32-39",
]
Kind = Literal["threads", "processes", "dask", "ray"]


@pytest.fixture(scope="module")
def model(home: Path) -> AssembledModel:
    """The tiny profile's."""
    spec = load_spec("tiny")
    return assemble.assemble_and_freeze(fetch.fetch_backbones(spec.backbones), spec.model)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of them are enough. Who reads a piece is told its rows, so this process alone has to know."""
    monkeypatch.setattr(procedural, "PIECE_ROWS", 16)


def data_spec(kind: Kind = "threads", num: int = 1, **changes: Any) -> DataSpec:
    workers = WorkersSpec(kind=kind, num=num)
    return load_spec("tiny").data.model_copy(update={"max_samples": 40, "workers": workers, **changes})


@prefect.flow
def story(model: AssembledModel, spec: DataSpec) -> tuple[ValidatedData, str]:
    """One chapter of ``train-projector``, and the id of its run."""
    return validate_stream(model, spec, NUM_HELD_OUT), str(prefect.runtime.flow_run.get_id())


def checked_anew(model: AssembledModel, spec: DataSpec) -> tuple[ValidatedData, str]:
    with temporary_settings({PREFECT_TASKS_REFRESH_CACHE: True}):
        return story(model, spec)


@pytest.fixture(scope="module")
def by_one_thread(model: AssembledModel) -> ValidatedData:
    """What no task runner has a part in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(procedural, "PIECE_ROWS", 16)
        return validate.validate_stream(model, data_spec(), NUM_HELD_OUT, lambda *_: Cursor())


def pieces_of(story_id: str) -> tuple[FlowRun, list[TaskRun]]:
    """The flow run below the story's stage, and its task runs."""
    with get_client(sync_client=True) as client:
        flow_run = FlowRunFilter(id=FlowRunFilterId(any_=[story_id]))  # type: ignore[list-item]
        nodes = client.read_task_runs(flow_run_filter=flow_run)
        (below,) = [node.state.state_details.child_flow_run_id for node in nodes if "validate-pieces" in node.name]
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[below])))
        return client.read_flow_run(below), runs


def only_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, this process does not check a piece."""

    def refuse(*what: object) -> CheckedPiece:
        raise AssertionError("checked in the process of the flow")

    monkeypatch.setattr(validate, "check_piece", refuse)


@pytest.mark.parametrize(
    ("kind", "num"),
    [("threads", 1), ("threads", 2), ("processes", 2), pytest.param("dask", 2, marks=pytest.mark.slow)],
)
def test_the_snapshots_are_the_same_whoever_checks(
    kind: Kind, num: int, model: AssembledModel, by_one_thread: ValidatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "threads":
        only_elsewhere(monkeypatch)
    data, story_id = checked_anew(model, data_spec(kind, num))
    assert data == by_one_thread
    below, runs = pieces_of(story_id)
    assert below.name == f"scenes by {num} {kind}"
    assert sorted(run.name for run in runs) == PIECES
    assert {run.state_name for run in runs} == {"Completed"}
    assert all("llava-pipeline" in run.tags for run in runs)


def test_who_checks_is_no_reason_to_check_again(model: AssembledModel, caplog: pytest.LogCaptureFixture) -> None:
    first, _ = story(model, data_spec("threads", 1))
    with caplog.at_level(logging.INFO, logger="llava_pipeline.flow"):
        second, _ = story(model, data_spec("threads", 2, patience_seconds=1.0))
        assert caplog.messages[-1] == "validate-stream: nothing changed, the earlier result is reused"
    assert first == second


def test_other_rules_are_a_reason_to_check_again(model: AssembledModel, caplog: pytest.LogCaptureFixture) -> None:
    story(model, data_spec())
    with caplog.at_level(logging.INFO, logger="llava_pipeline.flow"):
        caplog.clear()  # an earlier test may have made the log talkative: what the first story said is not asked
        story(model, data_spec(near_distance=3))
    assert [line for line in caplog.messages if "nothing changed" in line] == []


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> None:
    """The first piece of the training split fails so many times."""
    real, calls = validate.check_piece, itertools.count()

    def check_piece(*what: Any) -> CheckedPiece:
        if what[2] == "train" and what[3].start == 0 and next(calls) < times:
            raise error
        return real(*what)

    monkeypatch.setattr(validate, "check_piece", check_piece)
    monkeypatch.setattr(flows.workers.check_piece, "retry_delay_seconds", 0)


@pytest.mark.slow
def test_a_piece_whose_source_is_out_of_reach_twice_is_read_the_third_time(
    model: AssembledModel, by_one_thread: ValidatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, SourceUnavailable("503"), times=2)
    data, story_id = checked_anew(model, data_spec())
    assert data == by_one_thread
    _, runs = pieces_of(story_id)
    assert {run.name: run.run_count for run in runs} == dict.fromkeys(PIECES, 1) | {PIECES[2]: 3}


def test_what_another_try_will_not_mend_is_not_tried_again(
    model: AssembledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, SpecError("no"), times=1)
    with pytest.raises(SpecError, match="no"):
        checked_anew(model, data_spec())


@pytest.mark.usefixtures("prefect_server")
def test_workers_are_told_the_server_of_the_run_where_no_setting_names_one() -> None:
    @prefect.flow
    def told() -> tuple[str, str | None]:
        server = PREFECT_API_URL.value()
        with temporary_settings({PREFECT_API_URL: None}), one_server_for_all():
            return server, PREFECT_API_URL.value()

    server, passed_on = told()
    assert passed_on is not None
    assert passed_on.rstrip("/") == server.rstrip("/")


def die(model: AssembledModel, spec: DataSpec, split: str, piece: Piece) -> None:
    """What the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processes", "dask"])
def test_a_worker_that_is_killed_ends_the_run_with_the_reason(
    kind: Kind, model: AssembledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows.workers, "check_piece", prefect.Task(die, persist_result=False))
    with pytest.raises(WorkerDied, match=r"was killed.*run again"):
        checked_anew(model, data_spec(kind))


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_a_cluster_without_its_extra_tells_how_to_install_it(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"prefect_{kind}.task_runners", None)
    with pytest.raises(SpecError, match=rf"data\.workers\.kind={kind} .* pip install 'llava-pipeline\[{kind}\]'"):
        task_runner(WorkersSpec(kind=kind, num=2))


def test_an_address_of_a_cluster_is_not_given_to_threads() -> None:
    with pytest.raises(SpecError, match=r"tcp://here:1 .* set the kind to dask or ray"):
        task_runner(WorkersSpec(kind="threads", address="tcp://here:1"))


def test_a_worker_that_does_not_see_the_store_says_what_to_set(
    model: AssembledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path))
    validate._processor_of.cache_clear()
    piece = next(validate.planned(procedural.ScenesReader(data_spec().source, "train"), validate.Cursor(), 8))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=rf"{tmp_path}; point LLAVA_PIPELINE_HOME .* at one shared folder"):
        flows.workers.check_piece.fn(model, data_spec("dask"), "train", piece)


def test_the_data_report_is_shown_in_prefect(model: AssembledModel) -> None:
    _, story_id = checked_anew(model, data_spec())
    with get_client(sync_client=True) as client:
        (artifact,) = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                key=ArtifactFilterKey(any_=["data-report"]),
                flow_run_id=ArtifactFilterFlowRunId(any_=[story_id]),  # type: ignore[list-item]
            )
        )
    assert artifact.type == "markdown"
    assert "scenes/1/train" in str(artifact.data)


def test_a_report_that_cannot_be_made_costs_nothing_else(
    by_one_thread: ValidatedData, caplog: pytest.LogCaptureFixture
) -> None:
    rows = by_one_thread.train.rows.model_copy(update={"digest": "0" * 64})
    lost = by_one_thread.model_copy(update={"train": by_one_thread.train.model_copy(update={"rows": rows})})
    with caplog.at_level(logging.WARNING, logger="llava_pipeline.flow"):
        show_report(lost)
    assert Counter(line.split(":")[0] for line in caplog.messages) == {"the data report is not shown in Prefect": 1}


@pytest.mark.parametrize(
    ("source", "may_change"),
    [
        ({"kind": "scenes"}, False),
        ({"kind": "easy-vqa"}, False),
        ({"kind": "hub", "repo_id": "a/b", "revision": "0" * 40}, False),
        ({"kind": "hub", "repo_id": "a/b", "revision": "main"}, True),
        ({"kind": "parquet", "path": "x"}, True),
        ({"kind": "jsonl", "path": "x"}, True),
        ({"kind": "llava-json", "path": "x"}, True),
        ({"kind": "webdataset", "path": "x"}, True),
        ({"kind": "folder", "path": "x"}, True),
    ],
)
def test_data_that_may_be_other_tomorrow_is_read_again(source: dict[str, Any], may_change: bool) -> None:
    content = load_spec("tiny").data.model_dump(mode="json") | {"source": source}
    assert may_change_underneath(DataSpec.model_validate(content)) is may_change


def test_an_increment_is_never_reused() -> None:
    assert may_change_underneath(data_spec(increment=True))


def test_whoever_checks_is_read_from_the_command_line() -> None:
    spec: RunSpec = load_spec("tiny", ["data.workers.kind=dask", "data.workers.num=2"])
    assert spec.data.workers == WorkersSpec(kind="dask", num=2)
