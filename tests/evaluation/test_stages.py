"""Training and evaluation as stages, from frozen parts in every precision; features, projector and loss keep to it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_pipeline import store
from llava_pipeline.contracts import AssembledModel, Cursor, TrainedProjector, ValidatedData
from llava_pipeline.errors import FrozenWeightsChanged
from llava_pipeline.evaluation.evaluate import picture_features
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.freeze import frozen_digest
from llava_pipeline.spec import DataSpec, EvaluationSpec, ScenesSource, TrainingSpec
from llava_pipeline.stages import evaluate as evaluate_stage
from llava_pipeline.stages import train as train_stage
from llava_pipeline.stages.validate import validate_stream
from llava_pipeline.training.loop import StepRecord, place

CPU = torch.device("cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def data(assembled: AssembledModel) -> ValidatedData:
    return validate_stream(assembled, DataSpec(source=ScenesSource(), max_samples=8), 6, lambda *_: Cursor())


def trained_in(precision: str, assembled: AssembledModel, data: ValidatedData) -> TrainedProjector:
    values: dict[str, Any] = {"precision": precision, "device": "cpu", "max_steps": 3, "batch_size": 2}
    return train_stage.train_projector(assembled, data.train, TrainingSpec(**values))


@pytest.mark.parametrize("precision", PRECISIONS)
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

    monkeypatch.setattr(evaluate_stage, "picture_features", features_seen)
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
    assembled: AssembledModel, data: ValidatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(llava: Llava, *_: Any) -> list[StepRecord]:
        with torch.no_grad():
            llava.model.lm_head.weight[0, 0] += 1
        return []

    def kept(*_: Any) -> None:
        raise AssertionError("something was kept")

    monkeypatch.setattr(train_stage, "run", spoil)
    monkeypatch.setattr(train_stage, "writing", kept)
    with pytest.raises(FrozenWeightsChanged):
        trained_in("fp32", assembled, data)


def test_the_frozen_weights_are_digested_twice(
    assembled: AssembledModel, data: ValidatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter(["a" * 64, "a" * 64])
    monkeypatch.setattr(train_stage, "frozen_digest", lambda _: next(digests))
    trained = trained_in("bf16", assembled, data)
    assert (trained.frozen_digest_before, trained.frozen_digest_after) == ("a" * 64, "a" * 64)
    assert next(digests, None) is None
    assert store.open_artifact(trained.projector).is_dir()


def test_the_final_loss_is_that_of_the_last_steps_that_were_applied() -> None:
    def record(step: int, loss: float, skipped: bool) -> StepRecord:
        return StepRecord(step, loss, 0.1, 1.0, 8, 2, 2, 0.0, skipped)

    applied = [record(1, 5.0, False), record(2, 3.0, False)]
    overflows = [record(3 + k, 9.0, True) for k in range(25)]
    assert train_stage.last_mean(applied + overflows) == 4.0
    assert train_stage.last_mean(applied + overflows, window=1) == 3.0
