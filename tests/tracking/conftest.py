"""Fixtures: real MLflow on SQLite, from a database that is migrated once, and an evaluation with small artifacts."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_pipeline import store
from llava_pipeline.contracts import (
    ArtifactRef,
    AskedQuestion,
    AssembledModel,
    Backbones,
    Cursor,
    Evaluation,
    FetchedBackbone,
    Grounding,
    Health,
    Interval,
    Likely,
    Score,
    Scored,
    Snapshot,
    TrainedProjector,
    YesNo,
)
from llava_pipeline.spec import (
    BackbonesSpec,
    DataSpec,
    EvaluationSpec,
    ModelSpec,
    RandomBackbone,
    RunSpec,
    ScenesSource,
    TrainingSpec,
)
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.settings import FILE_VARIABLE, URI_VARIABLE, Settings

MakeEvaluation = Callable[..., Evaluation]
NUM_STEPS = 3


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables: creating them takes seconds, copying the file none."""
    home = tmp_path_factory.mktemp("migrated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_PIPELINE_HOME", str(home))
        patch.delenv(URI_VARIABLE, raising=False)
        connect(Settings())
    return home / "mlflow.db"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of the pipeline, and a working directory without an mlflow.yml."""
    for variable in (URI_VARIABLE, FILE_VARIABLE, "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(folder))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


@pytest.fixture
def settings(home: Path, migrated_database: Path) -> Settings:
    """The defaults, with MLflow's tables in place."""
    shutil.copy(migrated_database, home / "mlflow.db")
    return Settings()


@pytest.fixture
def spec() -> RunSpec:
    """A small spec."""
    return tiny_spec()


def tiny_spec() -> RunSpec:
    """As nothing is run with it, its parts need not fit."""
    backbone = RandomBackbone(like="pocket/vision_tower", overrides={"hidden_size": 32})
    return RunSpec(
        profile="tiny",
        title="For tests.",
        backbones=BackbonesSpec(vision_tower=backbone, language_model=backbone),
        data=DataSpec(source=ScenesSource(), max_samples=8),
        training=TrainingSpec(max_steps=NUM_STEPS),
        evaluation=EvaluationSpec(max_samples=2),
    )


@pytest.fixture
def make_evaluation(home: Path) -> MakeEvaluation:
    """Builds an evaluation whose projector, history and answers are in the store; scores can be chosen."""
    return build_evaluation


def build_evaluation(
    *,
    right: float = 0.9,
    by_kind: dict[str, float] | None = None,
    shuffled: float = 0.4,
    untrained: float = 0.1,
    blind: float = 0.5,
    loss: float | None = 0.2,
    loss_shuffled: float | None = 1.5,
    final_loss: float = 0.25,
    held_out: str = "d",
    frozen_before: str = "f",
    frozen_after: str = "f",
    weights: bytes = b"weights",
    num_steps: int = NUM_STEPS,
    **changes: Any,
) -> Evaluation:
    """An evaluation with real small artifacts; ``changes`` are made to the finished evaluation."""
    kinds = {"color": right, "yes/no": right} if by_kind is None else by_kind
    projector = TrainedProjector(
        model=_model(),
        data=_snapshot("c"),
        projector=_artifact("projector", {"projector.safetensors": weights, "manifest.json": b"{}"}),
        history=_artifact("history", {"history.jsonl": _history(num_steps)}),
        num_steps=num_steps,
        num_samples=24,
        num_skipped_steps=0,
        final_loss=final_loss,
        held_out_loss=0.5,
        seconds=12.5,
        cost=0.0,
        device="cpu",
        num_processes=1,
        precision="float32",
        peak_memory_bytes=1 << 20,
        predicted_memory_bytes=1 << 21,
        frozen_digest_before=frozen_before * 64,
        frozen_digest_after=frozen_after * 64,
    )
    held_out_snapshot = _snapshot(held_out)
    scored = Scored(
        projector_digest=projector.projector.digest,
        held_out_digest=held_out_snapshot.rows.digest,
        lines=_artifact("scores", {"lines.jsonl": b""}),
        seconds=1.0,
        seconds_per_answer=0.01,
        peak_memory_bytes=1 << 22,
    )
    likely: dict[str, Any] = {"likelihood": 0.8, "likelihood_by_kind": dict.fromkeys(kinds, 0.8)}
    evaluation = Evaluation(
        projector=projector,
        spec=EvaluationSpec(max_samples=2),
        scored=scored,
        answers=_answers(),
        num_questions=2,
        held_out=held_out_snapshot,
        right_image=Score(exact_match=right, by_kind=kinds, loss=loss, chrf=70.0, rouge_l=0.6, **likely),
        shuffled_image=Score(
            exact_match=shuffled, by_kind=dict.fromkeys(kinds, shuffled), loss=loss_shuffled, **likely
        ),
        no_image=Likely(loss=2.0, likelihood=0.2, likelihood_by_kind=dict.fromkeys(kinds, 0.2)),
        untrained=Score(exact_match=untrained, by_kind=dict.fromkeys(kinds, untrained), loss=3.0, **likely),
        over_untrained=Interval(mean=0.7, low=0.6, high=0.8),
        grounding=Grounding(
            over_shuffled=Interval(mean=1.3, low=1.1, high=1.5),
            over_no_image=Interval(mean=1.8, low=1.6, high=2.0),
            by_kind={kind: Interval(mean=1.3, low=1.0, high=1.6) for kind in kinds},
        ),
        yes_no=YesNo(num_questions=1, accuracy=1.0, f1=1.0, yes_rate=0.5, true_yes_rate=0.5),
        health=Health(empty=0.0, repeating=0.0, unended=0.0, unended_short=0.0, mean_tokens=1.5, num_not_finite=0),
        blind_rate=blind,
        blind_by_kind=dict.fromkeys(kinds, blind),
        short_share=1.0,
        asked=(AskedQuestion(question="What is represented in the image?", answer="a woman"),),
        seconds=2.0,
    )
    return evaluation.model_copy(update=changes)


def _model() -> AssembledModel:
    files = ArtifactRef(kind="backbone", digest="a" * 64, num_bytes=1)
    part = FetchedBackbone(
        origin="embedded:pocket/part", license="Apache-2.0", weights="w", files=files, sha256={"w": "b" * 64}
    )
    return AssembledModel(
        backbones=Backbones(vision_tower=part, language_model=part),
        spec=ModelSpec(),
        image_size=32,
        num_image_tokens=16,
        num_total=1_100,
        num_trainable=100,
        num_frozen=1_000,
        frozen_digest="f" * 64,
        chat_template_digest="e" * 64,
        num_ignored_weights={},
    )


def _snapshot(name: str) -> Snapshot:
    """Eight rows and a refused one; snapshots of other names have other ids, and so other digests."""
    ids = [f"{name}/{n}" for n in range(8)]
    columns: dict[str, list[Any]] = {
        "id": ids, "questions": [["Which color?"]] * 8, "answers": [["red"]] * 8, "kinds": [["color"]] * 8,
        "input_ids": [[7] * 25] * 8, "labels": [[-100] * 20 + [7] * 5] * 8, "image": [0] * 8,
    }  # fmt: skip
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    images = {"sha256": ["a" * 64], "data": [picture.getvalue()], "width": [8], "height": [8]}
    refused = {"id": f"{name}/bad", "shard": 0, "row": 8, "reason": "too long", "detail": "9 tokens", "digest": ""}
    with store.writing("snapshot") as (folder, done):
        pq.write_table(pa.table(columns), folder / "rows.parquet")
        pq.write_table(pa.table(images), folder / "images.parquet")
        (folder / "rejected.jsonl").write_text(json.dumps(refused) + "\n", encoding="utf-8")
        (folder / "near.jsonl").write_text("", encoding="utf-8")
    return Snapshot(
        source=ScenesSource(),
        rows=done[0],
        origin="scenes:1",
        num_read=9,
        num_kept=8,
        rejected={"too long": 1},
        num_images=1,
        num_near_duplicates=0,
        num_supervised_tokens=40,
        num_tokens=200,
        began=Cursor(),
        ended=Cursor(row=9),
        num_left=91,
    )


def _history(num_steps: int) -> bytes:
    rows = [
        {
            "step": step,
            "loss": 3.0 / step,
            "learning_rate": 1e-3,
            "grad_norm": 0.5,
            "num_tokens": 200,
            "num_samples": 8,
            "seconds": 0.5,
            "data_seconds": 0.125,
            "time": 1_795_509_100.0 + 0.5 * step,
            "held_out_loss": 2.0 if step == num_steps else None,
            "tokens_per_pass": 1024,
            "peak_memory_bytes": 1 << 20,
            "useful_flops_per_second": 1e9,
            "mfu": 0.5,
            "cost": 0.01 * step,
            "skipped": False,
        }
        for step in range(1, num_steps + 1)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _answers() -> ArtifactRef:
    row = {"id": "1", "kind": "color", "question": "Which color?", "truth": "red", "answer": "red"}
    rows = [row | {"answer_shuffled": "blue", "answer_untrained": "", "loss": 0.1}, row | {"id": "2", "loss": None}]
    with store.writing("answers") as (folder, done):
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for name in ("grid.png", "example.png", "loss.png", "grounding.png", "asked.png"):
            Image.new("RGB", (8, 8)).save(folder / name)
        for kind in ("samples", "golden"):
            (folder / kind).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8)).save(folder / "samples" / f"{number:06}.webp")
        Image.new("RGB", (8, 8)).save(folder / "golden" / "0.png")
        golden = [{"picture": "0.png", "question": "Which color?", "answer": "red"}]
        (folder / "golden" / "questions.json").write_text(json.dumps(golden), encoding="utf-8")
    return done[0]


def _artifact(kind: str, files: dict[str, bytes]) -> ArtifactRef:
    with store.writing(kind) as (folder, done):
        for name, data in files.items():
            (folder / name).write_bytes(data)
    return done[0]
