"""Versions, aliases, promotion and download, on a real registry."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llava_pipeline.contracts import RecordedRun
from llava_pipeline.errors import DamagedArtifact, NoSuchRun, SpecError, TrackingError
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import listing, registry
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


def test_promotion_moves_the_aliases(recorded: list[RecordedRun], settings: Settings) -> None:
    assert registry.version_by_alias(NAME, "champion", settings) is None
    assert registry.promote(NAME, "1", None, settings) == ("1", None)
    assert registry.aliases(NAME, settings) == {"champion": "1", "challenger": "3"}
    assert registry.promote(NAME, "3", "1", settings) == ("3", "1")
    assert registry.aliases(NAME, settings) == {"champion": "3", "previous": "1"}
    tags = connect(settings).get_model_version(NAME, "3").tags
    assert tags["llava.promoted_over"] == "1"
    assert tags["llava.promoted_at"].endswith("+00:00")


def test_rollback_is_a_promotion_of_the_previous(recorded: list[RecordedRun], settings: Settings) -> None:
    registry.promote(NAME, "1", None, settings)
    registry.promote(NAME, "2", "1", settings)
    assert registry.promote(NAME, "1", "2", settings) == ("1", "2")


def test_moved_champion_is_refused(recorded: list[RecordedRun], settings: Settings) -> None:
    registry.promote(NAME, "1", None, settings)
    with pytest.raises(TrackingError, match=r"is version 1, but version 2 was compared with none; run the gate again"):
        registry.promote(NAME, "2", None, settings)
    assert registry.aliases(NAME, settings) == {"champion": "1", "challenger": "3"}


def test_promotion_can_be_repeated(recorded: list[RecordedRun], settings: Settings) -> None:
    registry.promote(NAME, "1", None, settings)
    registry.promote(NAME, "2", "1", settings)
    assert registry.promote(NAME, "2", "1", settings) == ("2", "1")
    assert registry.promote(NAME, "2", "2", settings) == ("2", "1")


def test_two_at_once_and_one_wins(recorded: list[RecordedRun], settings: Settings) -> None:
    def attempt(version: str) -> str:
        try:
            return registry.promote(NAME, version, None, settings)[0]
        except TrackingError:
            return "refused"

    with ThreadPoolExecutor(2) as pool:
        outcome = sorted(pool.map(attempt, ["1", "2"]))
    assert outcome[1] == "refused"
    assert registry.aliases(NAME, settings)["champion"] == outcome[0]


def test_unknown_version_has_no_aliases(recorded: list[RecordedRun], settings: Settings) -> None:
    with pytest.raises(NoSuchRun, match=r"no version 9; newest versions: 3, 2, 1; aliases: challenger=3"):
        registry.promote(NAME, "9", None, settings)
    with pytest.raises(NoSuchRun, match="nothing is registered as llava-projector-other"):
        registry.promote("llava-projector-other", "1", None, settings)


def test_champion_scores_come_back_exactly(recorded: list[RecordedRun], settings: Settings) -> None:
    assert registry.champion_scores(NAME, settings) is None
    registry.promote(NAME, "2", None, settings)
    scores = registry.champion_scores(NAME, settings)
    evaluation = recorded[1].evaluation
    assert scores is not None
    assert scores.version == "2"
    assert scores.exact_match == evaluation.right_image.exact_match
    assert scores.by_kind == evaluation.right_image.by_kind
    assert scores.held_out_digest == evaluation.held_out_digest


def test_champion_without_scores(recorded: list[RecordedRun], settings: Settings) -> None:
    registry.promote(NAME, "1", None, settings)
    connect(settings).delete_model_version_tag(NAME, "1", "llava.exact_match")
    with pytest.raises(
        TrackingError, match="version 1 of llava-projector-tiny is champion but its tags hold no scores"
    ):
        registry.champion_scores(NAME, settings)


def test_download_by_run_version_and_alias(recorded: list[RecordedRun], settings: Settings, home: Path) -> None:
    registry.promote(NAME, "2", None, settings)
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
    registry.promote(NAME, "1", None, settings)
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
