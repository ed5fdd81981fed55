"""A run of stage instruct goes on from a recorded one, and everybody can see from which."""

from __future__ import annotations

import pytest

from flows.train import train
from llava_pipeline.contracts import Verdict
from llava_pipeline.errors import IncompatibleParts, NoSuchRun
from llava_pipeline.model import adapter, projector
from llava_pipeline.spec import RunSpec, load_spec
from llava_pipeline.tracking import listing, registry
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.settings import Settings

FEW = ("training.max_steps=2", "training.lora.rank=2", "data.max_samples=24", "evaluation.max_samples=12")
STILL = ("training.learning_rate=1e-9", "training.min_learning_rate=0")
NAME = "llava-projector-tiny"


def spec_of(stage: str, begin_with: str | None = None, *overrides: str) -> RunSpec:
    return load_spec("tiny", (*FEW, *overrides), stage=stage, begin_with=begin_with)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def aligned() -> Verdict:
    return train(spec_of("align"))


@pytest.fixture(scope="module")
def instructed(aligned: Verdict) -> Verdict:
    return train(spec_of("instruct", "challenger", *STILL))


@pytest.mark.slow
def test_it_begins_with_the_named_version_and_says_so_in_the_run_and_in_the_version(
    aligned: Verdict, instructed: Verdict
) -> None:
    client = connect(Settings())
    begin = {
        "llava.begin.run_id": aligned.run_id, "llava.begin.version": aligned.version, "llava.begin.model": NAME,
    }  # fmt: skip
    run = client.get_run(instructed.run_id)
    version = client.get_model_version(NAME, instructed.version)
    assert begin.items() <= run.data.tags.items()
    assert begin.items() <= version.tags.items()
    assert (run.data.tags["llava.stage"], version.tags["llava.learned"]) == ("instruct", "lora")
    assert int(run.data.params["params.num_learned"]) > int(run.data.params["params.num_trainable"])
    assert run.data.params["spec.begin_with"] == "challenger"
    row = listing.run(Settings(), instructed.run_id)
    assert (row["stage"], row["learned"], row["began_with"]["version"]) == ("instruct", "lora", aligned.version)


@pytest.mark.slow
def test_it_goes_on_from_the_weights_that_were_recorded(aligned: Verdict, instructed: Verdict) -> None:
    """At a rate of next to nothing the last look at the held-out samples is the one before."""
    fresh, adapted = (
        registry.recorded_evaluation(verdict.run_id, Settings()).projector for verdict in (aligned, instructed)
    )
    assert fresh.began_with is None
    assert adapted.began_with is not None
    assert adapted.began_with.projector == fresh.projector
    assert adapted.held_out_loss == pytest.approx(fresh.held_out_loss, abs=1e-4)


@pytest.mark.slow
def test_the_gate_weighs_it_as_any_other_and_a_fresh_process_loads_it(instructed: Verdict) -> None:
    assert instructed.decision == "challenger"  # random weights
    assert {rule.name for rule in instructed.rules if rule.passed} >= {"artifact_is_whole"}


@pytest.mark.slow
def test_what_it_leaves_behind_is_a_projector_and_an_adapter(instructed: Verdict) -> None:
    evaluation = registry.recorded_evaluation(instructed.run_id, Settings())
    folder = registry.download_projector(instructed.version, NAME, Settings())
    parts = projector.split(projector.load(folder, evaluation.projector.model))
    assert {name for name, state in parts.items() if state} == {"", adapter.PREFIX}


@pytest.mark.slow
def test_it_may_go_on_from_another_one_of_its_kind_but_not_with_another_adapter(instructed: Verdict) -> None:
    again = train(spec_of("instruct", instructed.version, *STILL))
    assert connect(Settings()).get_run(again.run_id).data.tags["llava.begin.version"] == instructed.version
    with pytest.raises(IncompatibleParts, match=r"set training\.lora to the same"):
        train(spec_of("instruct", instructed.version, "training.lora.rank=3"))
    with pytest.raises(IncompatibleParts, match="mode lora"):
        train(spec_of("align", instructed.version))


def test_a_beginning_that_is_not_there_is_told_before_anything_is_trained() -> None:
    with pytest.raises(NoSuchRun, match="has no alias 'nobody'"):
        train(spec_of("instruct", "nobody"))


@pytest.mark.slow
def test_a_language_model_trained_whole_is_recorded_and_asked_as_well(aligned: Verdict) -> None:
    verdict = train(spec_of("instruct", aligned.version, "training.language_model.mode=full", *STILL))
    evaluation = registry.recorded_evaluation(verdict.run_id, Settings())
    assert evaluation.projector.learned == "full"
    before = registry.recorded_evaluation(aligned.run_id, Settings())
    assert evaluation.projector.held_out_loss == pytest.approx(before.projector.held_out_loss, abs=1e-4)
    folder = registry.download_projector(verdict.version, NAME, Settings())
    assert (folder / projector.WHOLE).is_file()
