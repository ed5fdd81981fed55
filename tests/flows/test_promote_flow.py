"""A person's word as flows: real Prefect, real MLflow on SQLite, and versions that need no training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from flows.promote import promote, rollback
from llava_pipeline.errors import NoSuchRun, NotPromoted
from llava_pipeline.tracking import promotion, registry
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.history import history
from llava_pipeline.tracking.settings import Settings
from tests.registry.conftest import NAME, Register, register
from tests.tracking.conftest import migrated_database

__all__ = ["migrated_database", "register"]
TINY = {"profile": "tiny"}


@pytest.fixture
def settings(home: Path, tmp_path: Path, migrated_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A registry of its own for each test."""
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path))
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    return Settings()


def newest_flow_run() -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)[0]


def make_champion(version: str, champion: str | None, settings: Settings) -> None:
    promotion.promote(NAME, version, champion, settings, who="who", why="why")


def newest_event(settings: Settings) -> dict[str, Any]:
    return history(NAME, settings)[0]


def test_a_challenger_is_promoted_with_a_reason_and_the_history_names_the_flow_run(
    register: Register, settings: Settings
) -> None:
    register()
    register("1")
    assert promote("1", "the first one", **TINY) == "1"
    connect(settings).set_registered_model_alias(NAME, "challenger", "2")
    assert promote("2", "better on small objects", **TINY) == "2"
    assert registry.aliases(NAME, settings) == {"champion": "2", "previous": "1"}
    run, event = newest_flow_run(), newest_event(settings)
    assert (event["who"], event["why"]) == (f"flow run {run.name}", "better on small objects")
    assert (event["action"], event["from"], event["to"], event["outcome"]) == ("promote", "1", "2", "done")
    assert run.state_name == "Completed"
    assert run.parameters["reason"] == "better on small objects"


def test_what_the_gate_refused_fails_the_flow_run_by_name_and_moves_nothing(
    register: Register, settings: Settings
) -> None:
    register()
    register("1", gate="refused", better_than_champion="refused: -0.100")
    make_champion("1", None, settings)
    before = history(NAME, settings)
    with pytest.raises(NotPromoted, match=r"the gate refused version 2 .*better_than_champion \(-0.100\)"):
        promote("2", "please", **TINY)
    run = newest_flow_run()
    assert run.state_name == "Failed"
    assert "NotPromoted: the gate refused version 2" in str(run.state and run.state.message)
    assert registry.aliases(NAME, settings) == {"champion": "1"}
    assert history(NAME, settings) == before


def test_a_person_may_insist_and_the_history_tells_that(register: Register, settings: Settings) -> None:
    register(gate="refused", looks_at_the_image="refused: +0.001")
    assert promote("1", "we need one", despite_gate=True, **TINY) == "1"
    event = newest_event(settings)
    assert (event["why"], event["who"]) == ("we need one (despite the gate)", f"flow run {newest_flow_run().name}")


def test_a_verdict_against_another_champion_fails_the_flow_run_and_is_kept(
    register: Register, settings: Settings
) -> None:
    register()
    register()
    make_champion("1", None, settings)
    with pytest.raises(NotPromoted, match="was compared with none; judge it again"):
        promote("2", "in a hurry", **TINY)
    assert newest_flow_run().state_name == "Failed"
    assert registry.aliases(NAME, settings) == {"champion": "1"}
    event = newest_event(settings)
    assert (event["to"], event["why"]) == ("2", "in a hurry")
    assert event["outcome"].startswith("refused: the champion of")


def test_a_rollback_goes_to_the_previous_champion_and_to_a_named_one(register: Register, settings: Settings) -> None:
    for champion in ("none", "1", "2"):
        register(champion)
    for version, champion in (("1", None), ("2", "1"), ("3", "2")):
        make_champion(version, champion, settings)
    assert rollback("it answers in capitals", **TINY) == "2"
    event = newest_event(settings)
    assert (event["action"], event["from"], event["to"]) == ("rollback", "3", "2")
    assert (event["who"], event["why"]) == (f"flow run {newest_flow_run().name}", "it answers in capitals")
    assert rollback("further", version="1", **TINY) == "1"
    assert registry.aliases(NAME, settings) == {"champion": "1", "previous": "2"}


def test_a_rollback_to_what_never_was_champion_fails_the_flow_run(register: Register, settings: Settings) -> None:
    register()
    register("1")
    make_champion("1", None, settings)
    with pytest.raises(NoSuchRun, match="nothing to go back to"):
        rollback("back", **TINY)
    with pytest.raises(NotPromoted, match=r"version 2 .* was never champion"):
        rollback("back", version="2", **TINY)
    assert newest_flow_run().state_name == "Failed"
    assert registry.aliases(NAME, settings) == {"champion": "1"}
    assert len(history(NAME, settings)) == 1
