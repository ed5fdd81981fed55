"""Versions, aliases, promotion and download, on a real registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_pipeline.contracts import RecordedRun
from llava_pipeline.errors import DamagedArtifact, NoSuchRun, SpecError, TrackingError
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import listing, promotion, registry
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.run import record, record_failure
from llava_pipeline.tracking.settings import Settings
from tests.tracking.conftest import MakeEvaluation

NAME = "llava-projector-tiny"


@pytest.fixture
def recorded(spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings) -> list[RecordedRun]:
    """Three recorded runs: versions 1, 2 and 3."""
    return [
        record(spec, make_evaluation(right=0.9 + k / 100, weights=bytes([k])), settings, {}, started=1_000.0 + k)
        for k in range(3)
    ]


def crown(version: str, settings: Settings) -> None:
    promotion.promote(NAME, version, None, settings, who="a test", why="a test")


def test_the_champion_says_what_it_is(recorded: list[RecordedRun], settings: Settings) -> None:
    assert registry.champion(NAME, settings) is None
    crown("2", settings)
    found = registry.champion(NAME, settings)
    evaluation = recorded[1].evaluation
    assert found is not None
    assert (found.version, found.run_id) == ("2", recorded[1].run_id)
    assert found.frozen_digest == evaluation.projector.model.frozen_digest
    assert found.projector_digest == evaluation.projector.projector.digest


def test_a_champion_that_does_not_say_what_it_is(recorded: list[RecordedRun], settings: Settings) -> None:
    crown("1", settings)
    connect(settings).delete_model_version_tag(NAME, "1", "llava.frozen_digest")
    with pytest.raises(TrackingError, match="version 1 of llava-projector-tiny is champion but its tags do not say"):
        registry.champion(NAME, settings)


def test_the_evaluation_comes_back_as_it_was_recorded(recorded: list[RecordedRun], settings: Settings) -> None:
    assert registry.recorded_evaluation(recorded[1].run_id, settings) == recorded[1].evaluation


def test_download_by_run_version_and_alias(recorded: list[RecordedRun], settings: Settings, home: Path) -> None:
    crown("2", settings)
    for which in (recorded[1].run_id, "2", "champion"):
        folder = registry.download_projector(which, NAME, settings)
        assert folder == home / "cache" / "projectors" / recorded[1].run_id
        assert (folder / "projector.safetensors").read_bytes() == b"\x01"
    assert registry.download_projector(recorded[0].run_id, None, settings).name == recorded[0].run_id


def test_damaged_copy_is_fetched_again(recorded: list[RecordedRun], settings: Settings) -> None:
    weights = registry.download_projector("1", NAME, settings) / "projector.safetensors"
    weights.write_bytes(b"changed")
    registry.download_projector("1", NAME, settings)
    assert weights.read_bytes() == b"\x00"


def test_damaged_original_is_refused(recorded: list[RecordedRun], settings: Settings) -> None:
    uri = connect(settings).get_run(recorded[0].run_id).info.artifact_uri
    (Path(uri.removeprefix("file://")) / "projector" / "projector.safetensors").write_bytes(b"changed")
    with pytest.raises(DamagedArtifact, match="is not the one that was recorded"):
        registry.download_projector("1", NAME, settings)


def test_download_of_what_does_not_exist(spec: RunSpec, recorded: list[RecordedRun], settings: Settings) -> None:
    with pytest.raises(NoSuchRun, match="has no alias 'champion'; newest versions: 3, 2, 1; aliases: challenger=3"):
        registry.download_projector("champion", NAME, settings)
    with pytest.raises(NoSuchRun, match=rf"no run {'0' * 32}; the latest are: {recorded[2].run_id}"):
        registry.download_projector("0" * 32, NAME, settings)
    with pytest.raises(NoSuchRun, match="is not the id of a run"):
        registry.download_projector("champion", None, settings)
    failed = record_failure(spec, "reason", settings, {})
    with pytest.raises(NoSuchRun, match=r"\(FAILED\) has no projector"):
        registry.download_projector(failed or "", NAME, settings)


def test_listing(spec: RunSpec, recorded: list[RecordedRun], settings: Settings) -> None:
    crown("1", settings)
    other = spec.model_copy(update={"profile": "other"})
    record_failure(other, "no space left", settings, {}, started=2_000.0)
    rows = listing.runs(settings, None, 10)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["version"] for row in rows] == [None, "3", "2", "1"]
    assert [row["aliases"] for row in rows] == [[], ["challenger"], [], ["champion"]]
    assert [row["champion_version"] for row in rows] == [None, "1", "1", "1"]
    assert (rows[0]["status"], rows[0]["failure"]) == ("FAILED", "no space left")
    newest = rows[1]
    assert newest["run_id"] == recorded[2].run_id
    assert newest["started"] == "1970-01-01T00:16:42+00:00"
    assert newest["params"]["num_trainable"] == 100
    assert newest["frozen_digests_equal"] is True
    assert newest["metrics"]["eval/exact_match"] == 0.92
    assert newest["metrics"]["train/final_loss"] == 0.25
    assert [row["run_id"] for row in listing.runs(settings, "tiny", 1)] == [recorded[2].run_id]


def test_listing_of_nothing_creates_nothing(home: Path) -> None:
    assert listing.runs(Settings(), None, 10) == []
    assert list(home.iterdir()) == []
    with pytest.raises(SpecError, match="ask for at least 1"):
        listing.runs(Settings(), None, 0)
