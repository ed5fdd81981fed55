"""Training and evaluation as stages, from frozen parts in every precision; features, projector and loss keep to it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_pipeline import store
from llava_pipeline.contracts import AssembledModel, Cursor, TrainedProjector, ValidatedData
from llava_pipeline.errors import FrozenWeightsChanged
from llava_pipeline.evaluation.features import picture_features
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.freeze import frozen_digest
from llava_pipeline.spec import DataSpec, EvaluationSpec, ScenesSource, TrainingSpec
from llava_pipeline.stages import evaluate as evaluate_stage
from llava_pipeline.stages import examine
from llava_pipeline.stages import train as train_stage
from llava_pipeline.stages.validate import validate_stream
from llava_pipeline.training.device import place
from llava_pipeline.training.run import Training
from llava_pipeline.training.world import World

CPU = torch.device("cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def data(assembled: AssembledModel) -> ValidatedData:
    return validate_stream(assembled, DataSpec(source=ScenesSource(), max_samples=8), 6, lambda *_: Cursor())


def trained_in(precision: str, assembled: AssembledModel, data: ValidatedData) -> TrainedProjector:
    values: dict[str, Any] = {"precision": precision, "device": "cpu", "max_steps": 3, "samples_per_step": 2}
    return train_stage.train_projector(assembled, data, TrainingSpec(**values))


@pytest.mark.parametrize(
    "precision", [pytest.param(name, marks=[] if name == "fp32" else pytest.mark.slow) for name in PRECISIONS]
)
def test_a_projector_is_trained_and_asked_in_one_precision(
    assembled: AssembledModel,
    data: ValidatedData,
    llava: Llava,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    trained = trained_in(precision, assembled, data)
    place(llava.model, CPU, PRECISIONS[precision])
    assert trained.precision == str(PRECISIONS[precision]).removeprefix("torch.")
    assert trained.frozen_digest_before == trained.frozen_digest_after == frozen_digest(llava.model)
    assert (trained.frozen_digest_before == assembled.frozen_digest) == (precision == "fp32")
    assert math.isfinite(trained.final_loss)
    assert (trained.num_steps, trained.num_skipped_steps) == (3, 0)

    seen: list[torch.dtype] = []

    def features_seen(*arguments: Any) -> torch.Tensor:
        features = picture_features(*arguments)
        seen.append(features.dtype)
        return features

    monkeypatch.setattr(examine, "picture_features", features_seen)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    spec = EvaluationSpec(
        max_samples=6, batch_size=4, max_new_tokens=3, num_pictures=2, ask=("?",), picture=str(tmp_path / "red.png")
    )
    evaluation = evaluate_stage.evaluate_generations(trained, data.held_out, spec)
    assert seen == [PRECISIONS[precision]]
    assert evaluation.num_questions == 6
    assert evaluation.right_image.loss is not None
    assert math.isfinite(evaluation.right_image.loss)
    assert len(evaluation.asked) == 1


def test_a_changed_frozen_weight_is_told_and_nothing_kept(
    assembled: AssembledModel, data: ValidatedData, tmp_path: Path
) -> None:
    job = train_stage.make_job(assembled, data, TrainingSpec(max_steps=1, device="cpu"))
    training = Training(job, tmp_path, World(0, 1, CPU), time.monotonic())
    with torch.no_grad():
        training.llava.model.lm_head.weight[0, 0] += 1
    with pytest.raises(FrozenWeightsChanged):
        training.finish()
    assert not (tmp_path / "result").exists()


def test_every_step_is_followed_and_kept_with_its_pace(assembled: AssembledModel, data: ValidatedData) -> None:
    spec = TrainingSpec(max_steps=3, samples_per_step=2, device="cpu", held_out_every=2, held_out_samples=4)
    events: list[dict[str, Any]] = []
    trained = train_stage.train_projector(assembled, data, spec, None, events.append)
    steps = [event for event in events if event["event"] == "step"]
    rows = list(train_stage.read_lines(store.open_artifact(trained.history) / "history.jsonl"))
    assert [row["step"] for row in rows] == [event["step"] for event in steps] == [1, 2, 3]
    assert rows == steps
    assert [row["held_out_loss"] is None for row in rows] == [True, False, False]
    assert trained.held_out_loss == rows[-1]["held_out_loss"]
    assert events[-1]["event"] == "done"
    assert trained.predicted_memory_bytes > 0


def test_nothing_is_left_of_a_finished_training(assembled: AssembledModel, data: ValidatedData, home: Path) -> None:
    trained_in("fp32", assembled, data)
    assert list((home / "training").iterdir()) == []


def test_the_final_loss_is_that_of_the_last_steps_that_were_applied() -> None:
    applied = [{"loss": 5.0, "skipped": False}, {"loss": 3.0, "skipped": False}]
    overflows = [{"loss": 9.0, "skipped": True}] * 25
    assert train_stage.last_mean(applied + overflows) == 4.0
    assert train_stage.last_mean(applied + overflows, window=1) == 3.0
