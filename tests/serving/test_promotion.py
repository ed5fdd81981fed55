"""A promotion that waits for a real server: it follows, or the promotion is undone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from llava_pipeline.errors import NotPromoted
from llava_pipeline.tracking import promotion, registry
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.settings import Settings
from tests.serving.served import NAME, Served, serving, settings_of


@pytest.fixture
def settings(served_home: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(served_home))
    return settings_of(served_home)


def waiting_for(server: Served, settings: Settings, seconds: float) -> Settings:
    """Settings of somebody who waits until the server reports the version."""
    told = {"ready_url": f"{server.url}/readyz", "timeout_seconds": seconds}
    return Settings.model_validate(settings.model_dump() | {"serving": told})


def promote(version: str, settings: Settings) -> None:
    promotion.promote_by_person(NAME, version, settings, who="a test", why="to see", despite_gate=True)


def test_a_promotion_waits_until_the_server_follows_and_is_undone_where_it_does_not(
    served_home: Path, settings: Settings
) -> None:
    with serving(served_home) as server:
        patient = waiting_for(server, settings, 60)
        promote("2", patient)
        assert server.ready()["version"] == "2"  # at once: who promoted has waited for it
        assert server.ask().json()["model"] == f"{NAME}-v2"
        promote("1", patient)
        assert server.ready()["version"] == "1"
        promotion.rollback(NAME, None, patient, who="a test", why="back to the second")
        assert server.ready()["version"] == "2"
        promotion.rollback(NAME, "1", patient, who="a test", why="back to the first")
        wait_until_forgotten(served_home, "2")
        make_it_answer_otherwise(served_home)
        with pytest.raises(NotPromoted, match="still reported version 1"):
            promote("2", waiting_for(server, settings, 4))
        assert registry.aliases(NAME, settings)["champion"] == "1"
        assert (server.ready()["ready"], server.ready()["version"]) == (True, "1")
        assert server.ask().json()["model"] == f"{NAME}-v1"


def wait_until_forgotten(home: Path, version: str) -> None:
    """Until the server keeps no copy of a version that no alias needs: it fetches it anew then."""
    until = time.monotonic() + 30
    while list((home / "serving" / NAME).glob(f"{version}-*")):
        assert time.monotonic() < until
        time.sleep(0.1)


def make_it_answer_otherwise(home: Path) -> None:
    """Whoever loads version 2 and asks the golden questions gets other answers than are noted now."""
    run_id = connect(settings_of(home)).get_model_version(NAME, "2").run_id
    (path,) = (home / "mlartifacts").glob(f"**/{run_id}/artifacts/evaluation/golden/questions.json")
    golden = json.loads(path.read_text())
    assert golden
    path.write_text(json.dumps([one | {"answer": "an elephant"} for one in golden]))
