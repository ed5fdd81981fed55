"""Real projectors on the pocket parts before the real gate: the honest one goes live, and no cheat does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llava_pipeline.contracts import (
    AssembledModel,
    Cursor,
    Evaluation,
    Evidence,
    Inspection,
    RecordedRun,
    TrainedProjector,
    ValidatedData,
    Verdict,
)
from llava_pipeline.errors import IncompatibleParts, WeightsMismatch
from llava_pipeline.model import projector
from llava_pipeline.spec import RunSpec, load_spec
from llava_pipeline.stages import examine, promote, weigh
from llava_pipeline.stages.assemble import assemble_and_freeze
from llava_pipeline.stages.evaluate import evaluate_generations
from llava_pipeline.stages.fetch import fetch_backbones
from llava_pipeline.stages.train import train_projector
from llava_pipeline.stages.validate import validate_stream
from llava_pipeline.store import open_artifact, writing
from llava_pipeline.tracking import promotion, registry
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.run import record
from llava_pipeline.tracking.settings import GateSettings, Settings

SPEC: RunSpec = load_spec(
    "pocket", ["training.max_steps=40", "data.max_samples=1280", "evaluation.max_samples=400", "training.device=cpu"]
)
NAME = SPEC.registered_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One store and one MLflow for all of them."""
    folder = tmp_path_factory.mktemp("verdicts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_PIPELINE_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def model(home: Path) -> AssembledModel:
    return assemble_and_freeze(fetch_backbones(SPEC.backbones), SPEC.model)


@pytest.fixture(scope="module")
def data(model: AssembledModel) -> ValidatedData:
    return validate_stream(model, SPEC.data, SPEC.evaluation.max_samples, lambda *_: Cursor())


@pytest.fixture(scope="module")
def honest(model: AssembledModel, data: ValidatedData) -> TrainedProjector:
    """Forty steps: far from good, but it looks."""
    return train_projector(model, data, SPEC.training)


@pytest.fixture(scope="module")
def deceived(model: AssembledModel, data: ValidatedData) -> TrainedProjector:
    """The same forty steps, each question beside another one's picture."""
    with writing("snapshot") as (folder, done):
        shutil.copytree(open_artifact(data.train.rows), folder, dirs_exist_ok=True)
        (folder / "MANIFEST.json").unlink()
        rows = pq.read_table(folder / "rows.parquet")
        images = rows["image"].to_pylist()
        moved = pa.array(images[1:] + images[:1], pa.int64())
        pq.write_table(rows.set_column(rows.schema.get_field_index("image"), "image", moved), folder / "rows.parquet")
    train = data.train.model_copy(update={"rows": done[0]})
    return train_projector(model, data.model_copy(update={"train": train}), SPEC.training)


@pytest.fixture(autouse=True)
def nobody_is_champion(home: Path) -> None:
    """Each test begins without a champion."""
    client = connect(Settings())
    if registry.registered_model(client, NAME) is not None:
        for alias in registry.aliases(NAME, Settings()):
            client.delete_registered_model_alias(NAME, alias)


def evaluated(trained: TrainedProjector, data: ValidatedData) -> Evaluation:
    return evaluate_generations(trained, data.held_out, SPEC.evaluation)


def recorded(evaluation: Evaluation) -> RecordedRun:
    return record(SPEC, evaluation, Settings(), {})


def judged(run: RecordedRun, in_a_fresh_process: bool = False) -> Verdict:
    """As the flow judges; where the files are not what is tested, the process that takes ten seconds is left out."""
    if in_a_fresh_process:
        return promote.pass_gate_and_promote(run, weigh.weigh_against_champion(run), who="a test")
    champion = registry.champion(NAME, Settings())
    evidence = Evidence(
        inspection=Inspection(problem=None, projector_digest=run.evaluation.projector.projector.digest),
        champion=None if champion is None else weigh.ask_champion(run, champion, Settings()),
    )
    return promote.pass_gate_and_promote(run, evidence, who="a test")


def refused(verdict: Verdict) -> set[str]:
    return {rule.name for rule in verdict.rules if not rule.passed}


def changed(trained: TrainedProjector, scale: dict[str, float]) -> TrainedProjector:
    """The same history with other weights, saved as every projector is."""
    state = projector.load(open_artifact(trained.projector), trained.model)
    with writing("projector") as (folder, done):
        projector.save(
            folder, {name: tensor * scale.get(name, 1.0) for name, tensor in state.items()}, trained.model, {}
        )
    return trained.model_copy(update={"projector": done[0]})


def test_an_honest_one_becomes_the_first_champion_and_not_a_second_time(
    honest: TrainedProjector, data: ValidatedData
) -> None:
    evaluation = evaluated(honest, data)
    first = judged(recorded(evaluation), in_a_fresh_process=True)
    assert refused(first) == set()
    assert (first.decision, first.champion) == ("promoted", first.version)
    again = judged(recorded(evaluation))
    assert refused(again) == {"not_the_champion_again", "better_than_champion"}
    assert (again.decision, again.champion) == ("challenger", first.version)
    tags = connect(Settings()).get_model_version(NAME, again.version).tags
    assert tags["llava.gate"] == "refused"
    assert tags["llava.gate.champion"] == first.version


def test_a_verdict_whose_answer_was_lost_comes_out_the_same(honest: TrainedProjector, data: ValidatedData) -> None:
    run = recorded(evaluated(honest, data))
    own = run.evaluation.projector.projector.digest
    evidence = Evidence(inspection=Inspection(problem=None, projector_digest=own), champion=None)
    first, again = (promote.pass_gate_and_promote(run, evidence, who="a test") for _ in range(2))
    assert first == again
    assert (again.decision, again.champion) == ("promoted", run.version)
    assert connect(Settings()).get_model_version(NAME, run.version).tags["llava.gate"] == "passed"


@pytest.mark.slow
def test_one_that_learned_from_other_peoples_pictures_is_refused(
    deceived: TrainedProjector, data: ValidatedData
) -> None:
    verdict = judged(recorded(evaluated(deceived, data)))
    assert "looks_at_the_image" in refused(verdict)
    assert verdict.champion is None


@pytest.mark.parametrize(
    "scale",
    [
        {"linear_1.weight": 0.0},
        {"linear_2.weight": 0.0},
        {"linear_1.weight": 0.0, "linear_1.bias": 0.0, "linear_2.weight": 0.0, "linear_2.bias": 0.0},
    ],
    ids=["the picture does not enter", "constant", "zero"],
)
def test_one_that_says_the_same_to_every_picture_is_refused(
    honest: TrainedProjector, data: ValidatedData, scale: dict[str, float]
) -> None:
    evaluation = evaluated(changed(honest, scale), data)
    assert evaluation.grounding is not None
    assert evaluation.grounding.over_shuffled.low == pytest.approx(0.0, abs=5e-3)  # rounded otherwise in another batch
    assert "looks_at_the_image" in refused(judged(recorded(evaluation)))


def test_one_with_a_number_that_is_none_is_not_even_asked(honest: TrainedProjector, data: ValidatedData) -> None:
    with pytest.raises(WeightsMismatch, match="not finite"):
        evaluated(changed(honest, {"linear_2.weight": float("nan")}), data)


def test_another_towers_projector_is_not_even_asked(honest: TrainedProjector, data: ValidatedData) -> None:
    other = honest.model.model_copy(update={"frozen_digest": "0" * 64})
    with pytest.raises(IncompatibleParts, match="frozen_digest"):
        evaluated(honest.model_copy(update={"model": other}), data)


def test_a_file_that_was_tampered_with_is_refused(honest: TrainedProjector, data: ValidatedData) -> None:
    run = recorded(evaluated(honest, data))
    uri = connect(Settings()).get_run(run.run_id).info.artifact_uri
    weights = Path(uri.removeprefix("file://")) / "projector" / projector.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    verdict = judged(run, in_a_fresh_process=True)
    assert refused(verdict) == {"artifact_is_whole"}
    assert verdict.champion is None


@pytest.mark.slow
def test_a_projector_that_answers_otherwise_than_recorded_is_refused(
    honest: TrainedProjector, data: ValidatedData
) -> None:
    run = recorded(evaluated(honest, data))
    other = evaluated(changed(honest, {"linear_2.weight": 0.5}), data)
    swapped = run.evaluation.model_copy(update={"scored": other.scored})
    evidence = weigh.weigh_against_champion(run.model_copy(update={"evaluation": swapped}))
    assert evidence.inspection.problem is not None
    assert "were recorded" in evidence.inspection.problem


def test_the_champion_may_not_move_between_the_comparison_and_the_verdict(
    honest: TrainedProjector, data: ValidatedData
) -> None:
    first, second = (recorded(evaluated(honest, data)) for _ in range(2))
    own = second.evaluation.projector.projector.digest
    evidence = Evidence(inspection=Inspection(problem=None, projector_digest=own), champion=None)
    promotion.promote(NAME, first.version, None, Settings(), who="somebody else", why="meanwhile")
    verdict = promote.pass_gate_and_promote(second, evidence, who="a test")
    assert refused(verdict) == {"champion_has_not_moved"}
    assert verdict.champion == first.version


def test_a_better_one_replaces_the_champion_and_a_worse_one_does_not(
    honest: TrainedProjector, data: ValidatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 400 questions of six kinds, forty steps: what is sure of a kind is sure within a wide interval only.
    wide = Settings(gate=GateSettings(max_kind_regression=0.2))
    monkeypatch.setattr(promote, "load_settings", lambda: wide)
    weaker = evaluated(changed(honest, {"linear_1.weight": 0.0}), data)
    better = evaluated(honest, data)
    champion = recorded(weaker)
    promotion.promote(NAME, champion.version, None, Settings(), who="a person", why="for the test")
    verdict = judged(recorded(better))
    assert verdict.decision == "promoted", [rule for rule in verdict.rules if not rule.passed]
    assert (verdict.champion, verdict.previous) == (verdict.version, champion.version)
    back = judged(recorded(weaker))
    assert "better_than_champion" in refused(back)
    assert back.champion == verdict.version


def test_a_champion_that_was_asked_before_costs_nothing(
    honest: TrainedProjector, data: ValidatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorded(evaluated(honest, data))
    promotion.promote(NAME, run.version, None, Settings(), who="a test", why="a test")
    champion = registry.champion(NAME, Settings())
    assert champion is not None

    def no_model(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(examine, "load", no_model)
    scores = weigh.ask_champion(run, champion, Settings())
    assert scores.exact_match == run.evaluation.right_image.exact_match
    assert scores.likelihood_gain is not None
    assert scores.likelihood_gain.mean == 0.0
    again = evaluated(honest, data)
    assert again.right_image == run.evaluation.right_image


def test_equal_projector_and_set_give_equal_numbers(honest: TrainedProjector, data: ValidatedData, home: Path) -> None:
    before = evaluated(honest, data)
    shutil.rmtree(home / "cache" / "scores")
    after = evaluated(honest, data)
    assert after.answers == before.answers
    assert after.scored.lines == before.scored.lines


def test_approval_leaves_it_a_challenger_until_a_person_speaks(
    honest: TrainedProjector, data: ValidatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = Settings(registry=Settings().registry.model_copy(update={"approval": "required"}))
    monkeypatch.setattr(promote, "load_settings", lambda: waiting)
    verdict = judged(recorded(evaluated(honest, data)))
    assert verdict.passed
    assert (verdict.decision, verdict.champion) == ("challenger", None)
    moved = promotion.promote_by_person(NAME, verdict.version, Settings(), who="a person", why="looks good")
    assert moved.champion == verdict.version
    assert torch.is_tensor(
        projector.load(registry.download_projector("champion", NAME, Settings()), honest.model)["linear_1.bias"]
    )
