"""The embedded profile, shortened: a projector that learns to see, becomes champion and answers questions."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from PIL import Image

from flows.train import train
from llava_pipeline.contracts import Verdict
from llava_pipeline.data import scenes
from llava_pipeline.errors import NoSuchRun, NotPromoted, SpecError, TooManyRejected
from llava_pipeline.spec import load_spec
from llava_pipeline.stages.chat import answer_about
from llava_pipeline.stages.recorded import evaluate_recorded, judge_again
from llava_pipeline.tracking import listing, registry
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.history import history
from llava_pipeline.tracking.settings import Settings, tracking_uri

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


@pytest.mark.slow
def test_the_same_projector_again_stays_a_challenger(promoted: Verdict) -> None:
    again = train(load_spec("pocket", SHORT))
    assert (again.decision, again.version, again.champion) == ("challenger", "2", "1")
    assert [r.name for r in again.rules if not r.passed] == ["not_the_champion_again", "better_than_champion"]
    assert registry.aliases(again.registered_model, Settings()) == {"champion": "1", "challenger": "2"}


def test_samples_have_thumbnails_and_golden_questions_are_answered_again(promoted: Verdict, tmp_path: Path) -> None:
    folder = Path(connect(Settings()).download_artifacts(promoted.run_id, "evaluation", str(tmp_path)))
    table = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert 24 < len(rows) <= 36
    for row in rows:
        with Image.open(tmp_path / row["picture"]["filepath"]) as thumbnail:
            assert thumbnail.format == "WEBP"
            assert max(thumbnail.size) <= 256
    losses = [json.loads(line)["loss"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert max(row["loss"] for row in rows) == pytest.approx(max(losses))
    golden = json.loads((folder / "golden" / "questions.json").read_text(encoding="utf-8"))
    assert len({one["answer"] for one in golden}) == 3
    for one in golden:
        told = answer_about(
            folder / "golden" / one["picture"], one["question"], "champion", promoted.registered_model, 8, Settings()
        )
        assert told["answer"] == one["answer"]


@pytest.mark.slow
def test_mlflow_loads_the_champion_in_a_fresh_process_and_it_answers(promoted: Verdict, tmp_path: Path) -> None:
    circle = scenes.Shape("circle", "blue", "large", "center", 0.5, 0.5, 0.16)
    path = tmp_path / "scene.png"
    scenes.draw(scenes.Scene((circle,), (250, 250, 250))).save(path)
    code = (
        "import sys, mlflow, pandas\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "rows = pandas.DataFrame({'image': [open(sys.argv[2], 'rb').read()] * 2,\n"
        "    'question': ['What color is the circle?', 'How many shapes are there?']})\n"
        "print(model.predict(rows, params={'max_new_tokens': 4}))\n"
    )
    environment = os.environ | {
        "LLAVA_PIPELINE_HOME": str(tmp_path / "empty"), "MLFLOW_TRACKING_URI": tracking_uri(Settings()),
    }  # fmt: skip
    model = f"models:/{promoted.registered_model}@champion"
    done = subprocess.run(
        [sys.executable, "-c", code, model, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "['blue', 'one']"
    files = connect(Settings()).get_run(promoted.run_id).info.artifact_uri.removeprefix("file://")
    assert not [path for path in Path(files).rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]


def test_a_recorded_projector_is_asked_again_and_gives_the_same_numbers(promoted: Verdict) -> None:
    recorded = registry.recorded_evaluation(promoted.run_id, Settings())
    again = evaluate_recorded("champion", promoted.registered_model, None, None, None, Settings())
    assert (again.right_image, again.grounding, again.yes_no) == (
        recorded.right_image, recorded.grounding, recorded.yes_no,
    )  # fmt: skip
    assert again.held_out == recorded.held_out
    with pytest.raises(SpecError, match="--limit are about another source"):
        evaluate_recorded("champion", promoted.registered_model, None, None, 5, Settings())


def test_popes_files_are_asked_as_they_are(promoted: Verdict, tmp_path: Path) -> None:
    lines = []
    for number in range(12):
        color = ("blue", "red")[number % 2]
        circle = scenes.Shape("circle", color, "large", "center", 0.5, 0.5, 0.08 + number / 100)
        scenes.draw(scenes.Scene((circle,), (250, 250, 250))).save(tmp_path / f"{number}.png")
        asked = {"question_id": number + 1, "image": f"{number}.png", "text": "Is there a blue circle?"}
        lines.append(json.dumps(asked | {"label": "no" if number % 2 else "yes"}))
    (tmp_path / "coco_pope_random.json").write_text("\n".join(lines), encoding="utf-8")
    found = evaluate_recorded(
        "champion", promoted.registered_model, str(tmp_path / "coco_pope_random.json"), None, None, Settings()
    )
    assert found.num_questions == 12
    assert found.yes_no is not None
    assert (found.yes_no.num_questions, found.yes_no.true_yes_rate) == (12, 0.5)
    assert set(found.right_image.by_kind) == {"yes/no"}


def test_rows_that_cannot_be_asked_are_told_with_their_reasons(promoted: Verdict, tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "image": "gone.png", "text": "Is there a circle?", "label": "yes"},
        {"question_id": 2, "image": "gone.png", "text": "Is there a circle?", "label": "perhaps"},
    ]
    path = tmp_path / "coco_pope_random.json"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(TooManyRejected, match=r"of 2 rows were refused 2 \(.*malformed 1") as told:
        evaluate_recorded("champion", promoted.registered_model, str(path), None, None, Settings())
    assert "image_" in str(told.value)


@pytest.mark.slow
def test_a_version_is_judged_again_and_history_tells_who_moved_the_champion(promoted: Verdict) -> None:
    with pytest.raises(NotPromoted, match="version 1 of llava-projector-pocket is champion; it was judged when"):
        judge_again("champion", promoted.registered_model, "ann", Settings())
    with pytest.raises(NoSuchRun, match="has no version 99"):
        judge_again("99", promoted.registered_model, "ann", Settings())
    assert connect(Settings()).get_model_version(promoted.registered_model, "1").tags["llava.gate"] == "passed"
    verdict = judge_again("challenger", promoted.registered_model, "ann", Settings())
    assert verdict.version == "2"
    assert "not_the_champion_again" in {rule.name for rule in verdict.rules if not rule.passed}
    assert verdict.champion == "1"
    (event,) = history(promoted.registered_model, Settings())
    assert (event["action"], event["to"], event["outcome"]) == ("promote", "1", "done")
    assert event["who"].startswith("flow run ")


@pytest.mark.slow
def test_the_verdict_is_a_page_that_says_what_would_have_to_change(promoted: Verdict, tmp_path: Path) -> None:
    versions = connect(Settings()).search_model_versions(f"name = '{promoted.registered_model}'")
    refused = next(version for version in versions if version.tags.get("llava.gate") == "refused")
    page = Path(connect(Settings()).download_artifacts(refused.run_id, "gate.md", str(tmp_path))).read_text()
    assert "refused" in page.splitlines()[0]
    assert "| looks at the image | pass |" in page
    assert "## What would have to change" in page
    assert "nothing has changed since" in page


@pytest.mark.slow
def test_mlflow_serves_the_champion_over_http(promoted: Verdict, tmp_path: Path) -> None:
    circle = scenes.Shape("circle", "blue", "large", "center", 0.5, 0.5, 0.16)
    picture = io.BytesIO()
    scenes.draw(scenes.Scene((circle,), (250, 250, 250))).save(picture, "PNG")
    row = [base64.b64encode(picture.getvalue()).decode(), "What color is the circle?"]
    asked = {"dataframe_split": {"columns": ["image", "question"], "data": [row]}, "params": {"max_new_tokens": 4}}
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    environment = os.environ | {
        "LLAVA_PIPELINE_HOME": str(tmp_path / "empty"), "MLFLOW_TRACKING_URI": tracking_uri(Settings()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    model = f"models:/{promoted.registered_model}@champion"
    process = subprocess.Popen(
        ["mlflow", "models", "serve", "-m", model, "--env-manager", "local", "-p", str(port)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/ping", timeout=5).raise_for_status()
                break
            except requests.RequestException:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
        answer = requests.post(f"http://127.0.0.1:{port}/invocations", json=asked, timeout=60)
        assert answer.json() == {"predictions": ["blue"]}
        broken = asked | {"dataframe_split": {"columns": ["image", "question"], "data": [["aGVsbG8=", "?"]]}}
        refused = requests.post(f"http://127.0.0.1:{port}/invocations", json=broken, timeout=60)
        assert refused.status_code >= 400
        assert "row 0: the picture is not accepted" in refused.text
        assert requests.post(f"http://127.0.0.1:{port}/invocations", json=asked, timeout=60).ok
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
