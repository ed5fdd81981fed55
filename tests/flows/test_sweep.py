"""A sweep on the tiny profile: real trainings, real Prefect, real MLflow on SQLite."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import ParameterTypeError
from prefect.settings import PREFECT_API_URL, PREFECT_LOCAL_STORAGE_PATH

from flows.form import Changes
from flows.sweep import sweep
from llava_pipeline.cli.app import app
from llava_pipeline.cli.sweep import told as tell
from llava_pipeline.contracts import Combination, SweepRun, Swept, Trial
from llava_pipeline.errors import NothingTrained, SpecError, TooManyRejected
from llava_pipeline.spec import load_spec
from llava_pipeline.stages.sweep import combinations, ranked, swept
from llava_pipeline.tracking.client import connect, find_experiment
from llava_pipeline.tracking.reading import READING
from llava_pipeline.tracking.settings import Settings
from tests.tracking.conftest import migrated_database
from tests.tracking.test_run import compare, documented, files

__all__ = ["migrated_database"]
CHANGED = Changes.model_validate({
    "data": {"max_samples": 32},  # seen more than once, so that features are kept
    "training": {"max_steps": 9, "held_out_samples": 8, "device": "cpu"},
    "evaluation": {"max_samples": 12},
})  # fmt: skip
TOO_HIGH = 1e30
RATES = [1e-3, TOO_HIGH]
AXES = ("learning_rates", "warmup_shares", "seeds")


def swept_by(rates: list[float], warmups: list[float], seeds: list[int]) -> Swept:
    return sweep(rates, warmups, seeds, profile="tiny", overrides=CHANGED)


@pytest.fixture(scope="module")
def found(home: Path, migrated_database: Path) -> Swept:
    """A rate that trains, and one that cannot."""
    shutil.copy(migrated_database, home / "mlflow.db")
    return swept_by(RATES, [0.0], [0])


def children(parent: str) -> list[Any]:
    client = connect(Settings())
    experiment = find_experiment(client, Settings())
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"))


def flow_run_of(parent: str) -> str:
    return str(connect(Settings()).get_run(parent).data.tags["prefect.flow_run_id"])


def task_states(parent: str) -> list[tuple[str, str]]:
    """Name and last state of every stage of the flow run that made a sweep."""
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_of(parent)])))
    return sorted((run.name.rsplit("-", 1)[0], run.state_name or "") for run in runs)


@pytest.mark.slow
def test_every_combination_is_a_child_with_its_parameters_curve_and_results(found: Swept) -> None:
    runs = {run.info.run_id: run for run in children(found.run_id)}
    assert set(runs) == {trial.run_id for trial in found.trials}
    assert len(runs) == 2
    for trial in found.trials:
        data = runs[trial.run_id].data
        if trial.failure is not None:
            continue
        assert runs[trial.run_id].info.status == "FINISHED"
        asked = {name: float(data.params[f"spec.training.{name}"]) for name in trial.combination.model_dump()}
        assert asked == trial.combination.model_dump()
        assert data.metrics["eval/likelihood"] == trial.likelihood
        assert len(connect(Settings()).get_metric_history(trial.run_id, "train/loss")) == 9


@pytest.mark.slow
def test_a_combination_that_diverges_fails_alone_with_its_reason(found: Swept) -> None:
    failed = {trial.run_id: trial for trial in found.trials if trial.failure}
    assert {trial.combination.learning_rate for trial in failed.values()} == {TOO_HIGH}
    assert len(failed) == 1
    for run in children(found.run_id):
        assert (run.info.status == "FAILED") == (run.info.run_id in failed)
        if run.info.run_id in failed:
            assert run.data.tags["llava.failure"] == failed[run.info.run_id].failure
            assert "no number" in run.data.tags["llava.failure"]
    assert connect(Settings()).get_run(found.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_the_parent_has_table_page_picture_and_the_best_by_mean_likelihood(found: Swept, tmp_path: Path) -> None:
    folder = Path(connect(Settings()).download_artifacts(found.run_id, "", str(tmp_path)))
    table = json.loads((folder / "sweep.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["learning_rate"], row["warmup_share"], row["seed"]) for row in rows] == [
        tuple(trial.combination.model_dump().values()) for trial in found.trials
    ]
    with Image.open(folder / "sweep.png") as picture:
        assert len(set(picture.convert("L").getdata())) > 10  # something is drawn
    best = max((t for t in found.trials if t.likelihood is not None), key=lambda t: t.likelihood or 0.0)
    assert (found.settings[0].learning_rate, found.settings[0].warmup_share) == (
        best.combination.learning_rate, best.combination.warmup_share,
    )  # fmt: skip
    page = (folder / "sweep.md").read_text()
    assert found.night in page
    assert f"lr {TOO_HIGH:g}" in page.split("## Failed")[1]


@pytest.mark.slow
def test_the_command_for_a_night_gives_the_spec_of_the_best_trial(found: Swept) -> None:
    words = shlex.split(found.night)
    assert words[:4] == ["llava-pipeline", "run", "--profile", "tiny"]
    spec = load_spec("tiny", words[5::2])
    assert set(words[4::2]) == {"--set"}
    best = found.settings[0]
    assert (spec.training.learning_rate, spec.training.warmup_share) == (best.learning_rate, best.warmup_share)
    assert (spec.training.max_steps, spec.data.max_samples, spec.evaluation.max_samples) == (9, 32, 12)


@pytest.mark.slow
def test_features_are_computed_once_and_data_are_checked_once(found: Swept, home: Path) -> None:
    kept = list((home / "features").glob("*/*.safetensors"))
    assert len(kept) == 1  # of 32 pictures; another one would have its digest in its name
    assert kept[0].stat().st_mtime < min(run.info.end_time for run in children(found.run_id)) / 1000
    states = task_states(found.run_id)
    count = {name: sum(one == name for one, _ in states) for name, _ in states}
    assert (count["validate-stream"], count["fetch-backbones"], count["train-projector"]) == (1, 1, 2)
    assert count["evaluate-generations"] == 1  # what diverged is not asked


@pytest.mark.slow
def test_nothing_is_registered_and_no_increment_is_read_away_from_the_nights(found: Swept) -> None:
    client = connect(Settings())
    assert list(client.search_registered_models()) == []
    assert [run.data.tags.get(READING) for run in children(found.run_id)] == [None] * 2


@pytest.mark.slow
def test_the_names_of_a_sweep_are_documented(found: Swept) -> None:
    client = connect(Settings())
    parent, trial = client.get_run(found.run_id), client.get_run(found.trials[0].run_id)
    own = {key for key in parent.data.params if not key.startswith("spec.")} | set(parent.data.metrics)
    own |= set(files("", client, found.run_id))
    own |= {key for run in (parent, trial) for key in run.data.tags if not key.startswith("llava.version.")}
    known = documented("Tags of a run") | {"mlflow.user", "mlflow.source.name", "mlflow.source.type"}
    assert compare(own - known - {"prefect.flow_run_id", "prefect.flow_run_url"}, documented("Sweeps")) == (
        set(),
        set(),
    )
    asked = documented("Parameters") | documented("Metrics of every optimizer step") | documented("Metrics of the run")
    assert compare(set(trial.data.params) | set(trial.data.metrics), asked)[0] == set()


@pytest.mark.slow
def test_other_combinations_are_another_sweep_and_what_was_trained_before_is_not_trained_again(found: Swept) -> None:
    again = swept_by([1e-3], [0.0], [0])
    assert again.run_id != found.run_id
    states = task_states(again.run_id)
    assert states.count(("train-projector", "Cached")) == 1
    assert [t.likelihood for t in again.trials] == [t.likelihood for t in found.trials if not t.failure]


@pytest.mark.slow
def test_what_ends_a_sweep_is_told_by_its_run_too(found: Swept) -> None:
    hopeless = Changes.model_validate({"data": {"max_samples": 32, "max_tokens": 9}, "training": {"max_steps": 9}})
    with pytest.raises(TooManyRejected):
        sweep(RATES, [0.1], [0], profile="tiny", overrides=hopeless)
    client = connect(Settings())
    asked = "tags.`llava.kind` = 'sweep' and attributes.status = 'FAILED'"
    (failed,) = client.search_runs([found.experiment_id], asked)
    assert "too_many_tokens" in failed.data.tags["llava.failure"]


@pytest.mark.slow
def test_where_all_fail_the_sweep_has_failed_and_says_why(found: Swept) -> None:
    failed = [trial for trial in found.trials if trial.failure]
    run = SweepRun(experiment_id=found.experiment_id, run_id=found.run_id)
    with pytest.raises(NothingTrained, match=r"none of 1 combinations could be trained; the first one: .*no number"):
        swept(run, "tiny", load_spec("tiny"), failed)


KILLED = [1e-3, 4e-3]  # the first one was trained before, so this is about the second


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_in_the_same_run_where_it_was(found: Swept, home: Path) -> None:
    code = (
        "import tests.flows.test_sweep as t\n"
        "t.swept_by(t.KILLED, [0.0], [0])\n"
    )  # fmt: skip
    environment = os.environ | {"PREFECT_API_URL": str(PREFECT_API_URL.value()), "PYTHONPATH": str(ROOT)}
    environment["PREFECT_LOCAL_STORAGE_PATH"] = str(PREFECT_LOCAL_STORAGE_PATH.value())  # where results are kept
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=home / "work")
    parent, done = wait_for_one_child(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = swept_by(KILLED, [0.0], [0])
    assert again.run_id == parent
    statuses = {run.info.run_id: run.info.status for run in children(parent)}
    assert sorted(statuses.values()) == ["FINISHED"] * 2
    assert done in statuses  # the one that was finished is the same
    assert ("train-projector", "Cached") in task_states(parent)
    run = connect(Settings()).get_run(parent)
    assert (run.info.status, run.data.tags.get("llava.failure")) == ("FINISHED", None)


ROOT = Path(__file__).resolve().parents[2]


def wait_for_one_child(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Parent and first finished child of the sweep that another process makes."""
    client, until = connect(Settings()), time.monotonic() + 150
    experiment = find_experiment(client, Settings())
    assert experiment is not None
    while time.monotonic() < until:
        assert process.poll() is None
        asked = "tags.`llava.kind` = 'sweep' and attributes.status = 'RUNNING'"
        for parent in client.search_runs([experiment.experiment_id], asked):
            finished = [run.info.run_id for run in children(parent.info.run_id) if run.info.status == "FINISHED"]
            if finished:
                return parent.info.run_id, finished[0]
        time.sleep(0.1)
    raise AssertionError("no combination was finished")


def test_prefect_s_form_has_a_sentence_and_the_limits_of_every_value() -> None:
    properties = sweep.parameters.properties
    assert [name for name, told in properties.items() if not told.get("description")] == []
    limits = {name: properties[name]["items"] | {"least": properties[name]["minItems"]} for name in AXES}
    assert [limits[name].get("exclusiveMinimum", limits[name].get("minimum")) for name in AXES] == [0, 0, 0]
    assert limits["warmup_shares"]["exclusiveMaximum"] == 1
    assert {limit["least"] for limit in limits.values()} == {1}


@pytest.mark.parametrize(
    ("rates", "warmups", "seeds", "told"),
    [
        ([0.0], [0.1], [0], "greater than 0"),
        ([1e-3], [1.0], [0], "less than 1"),
        ([1e-3], [0.1], [-1], "greater than or equal to 0"),
        ([], [0.1], [0], "at least 1 item"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_runs(
    rates: list[float], warmups: list[float], seeds: list[int], told: str
) -> None:
    with pytest.raises(ParameterTypeError, match=told):
        swept_by(rates, warmups, seeds)


def test_too_many_combinations_are_refused_with_their_number() -> None:
    with pytest.raises(SpecError, match=r"5 x 4 x 4 = 80 combinations .* more than 64"):
        combinations(load_spec("tiny"), [k * 1e-3 for k in range(1, 6)], [0.0, 0.1, 0.2, 0.3], [0, 1, 2, 3])
    spec = load_spec("tiny")
    assert len(combinations(spec, [k * 1e-3 for k in range(1, 5)], [0.0, 0.1, 0.2, 0.3], [0, 1, 2, 3])) == 64
    assert len(combinations(spec, [1e-3, 1e-3], [0.1, 0.1], [0])) == 1
    with pytest.raises(SpecError, match=r"1e-05 lies below training.min_learning_rate=0.0001"):
        combinations(spec, [1e-5], [0.1], [0])


@pytest.mark.slow
def test_a_seed_that_failed_puts_a_setting_behind_those_that_were_trained_whole(found: Swept) -> None:
    def trial(rate: float, seed: int, likelihood: float | None) -> Trial:
        failure = None if likelihood is not None else "diverged"
        return Trial(
            combination=Combination(learning_rate=rate, warmup_share=0.1, seed=seed), run_id="r", failure=failure,
            likelihood=likelihood,
        )  # fmt: skip

    trials = [trial(1.0, 0, 0.9), trial(1.0, 1, None), trial(0.1, 0, 0.5), trial(0.1, 1, 0.7), trial(0.2, 0, 0.55)]
    assert [(one.learning_rate, one.num_failed) for one in ranked(trials)] == [(0.1, 0), (0.2, 0), (1.0, 1)]
    best = ranked(trials)[0]
    assert (best.likelihood, best.lowest, best.highest) == (pytest.approx(0.6), 0.5, 0.7)


@pytest.mark.slow
def test_the_command_prints_the_table_and_the_sweep_as_json(
    found: Swept, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    words = ["sweep", "--profile", "tiny", "--learning-rate", "1e-3", "--warmup", "0", "--seed", "0"]
    changed = ["data.max_samples=32", "training.max_steps=9", "training.held_out_samples=8", "training.device=cpu"]
    words += [word for one in [*changed, "evaluation.max_samples=12"] for word in ("--set", one)]
    tell(found)
    printed = capsys.readouterr().out
    assert f"{found.trials[0].likelihood:.4f}" in printed
    assert "--set training.learning_rate=0.001" in printed
    app([*words, "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["trials"][0]["likelihood"] == found.trials[0].likelihood
    with pytest.raises(SpecError, match="learning_rates"):
        app(["sweep", "--profile", "tiny", "--learning-rate", "-1"], standalone_mode=False)
