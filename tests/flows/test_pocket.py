"""The embedded profile, shortened: a projector that learns to see, becomes champion and answers questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.train import train
from llava_pipeline.contracts import Verdict
from llava_pipeline.data import scenes
from llava_pipeline.spec import load_spec
from llava_pipeline.stages.chat import answer_about
from llava_pipeline.tracking import listing, registry
from llava_pipeline.tracking.settings import Settings

SHORT = ("data.max_samples=3200", "training.max_steps=100", "evaluation.max_samples=180")


@pytest.fixture(scope="module")
def promoted(home: Path) -> Verdict:
    return train(load_spec("pocket", SHORT))


def test_it_sees_and_becomes_champion(promoted: Verdict) -> None:
    row = listing.run(Settings(), promoted.run_id)
    metrics = row["metrics"]
    assert metrics["eval/exact_match"] > 0.75
    assert abs(metrics["eval/exact_match_shuffled"] - metrics["eval/blind_rate"]) < 0.12
    assert abs(metrics["eval/exact_match_untrained"] - metrics["eval/blind_rate"]) < 0.12
    assert metrics["eval/loss"] < metrics["eval/loss_shuffled"]
    assert (promoted.decision, promoted.champion, row["aliases"]) == ("promoted", "1", ["champion"])


def test_the_champion_answers_about_a_picture_it_has_never_seen(promoted: Verdict, tmp_path: Path) -> None:
    circle = scenes.Shape("circle", "blue", "large", "center", 0.5, 0.5, 0.16)
    path = tmp_path / "a scene.png"
    scenes.draw(scenes.Scene((circle,), (250, 250, 250))).save(path)
    told = answer_about(path, "What color is the circle?", "champion", promoted.registered_model, 8, Settings())
    assert (told["answer"], told["run_id"]) == ("blue", promoted.run_id)


def test_the_same_projector_again_stays_a_challenger(promoted: Verdict) -> None:
    again = train(load_spec("pocket", SHORT))
    assert (again.decision, again.version, again.champion) == ("challenger", "2", "1")
    assert [rule.name for rule in again.rules if not rule.passed] == ["not_the_champion_again"]
    assert registry.aliases(again.registered_model, Settings()) == {"champion": "1", "challenger": "2"}
