"""The page of a model says what was measured, and what it cannot do."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking.card import card, headline
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.run import record
from llava_pipeline.tracking.settings import Settings, TrackingSettings, run_address
from tests.tracking.conftest import MakeEvaluation


def test_a_card_names_the_scores_the_parts_and_the_weak_kinds(spec: RunSpec, make_evaluation: MakeEvaluation) -> None:
    evaluation = make_evaluation(right=0.91, by_kind={"color": 0.97, "yes/no": 0.61})
    text = card(spec, evaluation, "0" * 32, {"torch": "2.13.0"})
    assert "| all | 0.910 | 0.400 | 0.100 | 0.500 |" in text
    assert "| yes_no | 0.610 |" in text
    assert "Weak at yes_no (61.0%)." in text
    assert "color (97.0%)" not in text
    assert evaluation.projector.projector.digest in text
    assert "torch 2.13.0" in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["pipeline_tag"] == "image-text-to-text"
    assert front["base_model"] == [
        evaluation.projector.model.backbones.vision_tower.origin,
        evaluation.projector.model.backbones.language_model.origin,
    ]


def test_a_card_says_where_it_is_not_sure_that_the_picture_matters(
    spec: RunSpec, make_evaluation: MakeEvaluation
) -> None:
    evaluation = make_evaluation()
    grounding = evaluation.grounding
    assert grounding is not None
    level = grounding.over_shuffled.model_copy(update={"low": -0.1})
    doubtful = evaluation.model_copy(update={"grounding": grounding.model_copy(update={"by_kind": {"color": level}})})
    assert "not sure that it looks at the picture for: color." in card(spec, doubtful, "0" * 32, {})
    unmeasured = evaluation.model_copy(update={"grounding": None})
    assert "Too few pictures were held out" in card(spec, unmeasured, "0" * 32, {})
    assert "nats" not in headline(unmeasured)


def test_the_card_lies_beside_the_weights_with_the_pictures_it_shows(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings, tmp_path: Path
) -> None:
    recorded = record(spec, make_evaluation(), settings, {})
    client = connect(settings)
    folder = Path(client.download_artifacts(recorded.run_id, "model", str(tmp_path)))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert recorded.run_id in text
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(shown) == 3
    assert all((folder / path).is_file() for path in shown)
    version = client.get_model_version(recorded.registered_model, recorded.version)
    note = client.get_run(recorded.run_id).data.tags["mlflow.note.content"]
    assert version.description.startswith(note)
    assert note.startswith("90.0% of")


def test_a_run_s_page_is_on_the_server_or_where_the_pages_are_served(settings: Settings) -> None:
    assert run_address(settings, "1", "ab") == "http://127.0.0.1:5001/#/experiments/1/runs/ab"
    served = settings.model_copy(update={"tracking": TrackingSettings(uri="http://mlflow:5000/")})
    assert run_address(served, "1", "ab") == "http://mlflow:5000/#/experiments/1/runs/ab"
