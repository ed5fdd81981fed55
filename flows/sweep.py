"""A sweep: learning rates, warm-ups and seeds on one snapshot, with the tower's features computed once.

The stages are those of the story, so what was trained before is not trained again: a sweep that was killed, and is
started again with the same parameters, goes on where it was, in the same MLflow run. It registers and promotes nothing.
"""

from __future__ import annotations

import logging
from typing import Annotated

import prefect
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.exceptions import ParameterTypeError
from pydantic import Field, ValidationError

from flows import hooks
from flows.form import Changes, Overrides, ProfileName, spec_of
from flows.links import tags_of_flow_run
from flows.stages import (
    assemble_and_freeze,
    evaluate_generations,
    fetch_backbones,
    find_beginning,
    stage,
    train_projector,
    validate_stream,
)
from llava_pipeline.contracts import (
    AssembledModel,
    Beginning,
    Combination,
    Evaluation,
    SweepRun,
    Swept,
    Trial,
    ValidatedData,
)
from llava_pipeline.errors import Diverged, SpecError
from llava_pipeline.spec import RunSpec, load_spec

log = logging.getLogger("llava_pipeline.flow")
MODULE = "llava_pipeline.stages.sweep"
LearningRates = Annotated[
    list[Annotated[float, Field(gt=0, lt=float("inf"))]],
    Field(min_length=1, max_length=64),
]
WarmupShares = Annotated[
    list[Annotated[float, Field(ge=0, lt=1)]],
    Field(min_length=1, max_length=64),
]
Seeds = Annotated[
    list[Annotated[int, Field(ge=0, lt=1 << 40)]],
    Field(min_length=1, max_length=64),
]


@stage(MODULE, minutes=30, retries=5, reuse=False)
def begin_sweep(spec: RunSpec, tried: list[Combination], tags: dict[str, str]) -> SweepRun:
    from llava_pipeline.tracking import sweeps
    from llava_pipeline.tracking.settings import load_settings

    return sweeps.begin(spec, tried, load_settings(), tags)


@stage(MODULE, minutes=30, retries=5, reuse=False)
def begin_trial(run: SweepRun, spec: RunSpec, combination: Combination) -> str:
    from llava_pipeline.stages import sweep as stages

    return stages.begin_trial(run, spec, combination)


@stage(MODULE, minutes=30, retries=5, reuse=False)
def record_trial(
    run: SweepRun, run_id: str, spec: RunSpec, combination: Combination, evaluation: Evaluation
) -> Trial:  # fmt: skip
    from llava_pipeline.stages import sweep as stages

    return stages.record_trial(run, run_id, spec, combination, evaluation)


@stage(MODULE, minutes=30, retries=5, reuse=False)
def record_sweep(run: SweepRun, found: Swept) -> None:
    from llava_pipeline.stages import sweep as stages

    stages.record_sweep(run, found)


@prefect.flow(name="sweep", on_running=[hooks.sweep])
def sweep(
    learning_rates: LearningRates,
    warmup_shares: WarmupShares = [0.05],  # noqa: B006
    seeds: Seeds = [0],  # noqa: B006
    profile: ProfileName = "pocket",
    overrides: Overrides = Changes(),  # noqa: B008
) -> Swept:
    """Try every learning rate with every warm-up and every seed; at most 64 combinations.

    Args:
        learning_rates: Peak learning rates to try.
        warmup_shares: Shares of the budget that warm up linearly, to try.
        seeds: Seeds of the order of samples: how much a result scatters.
        profile: A profile's name.
        overrides: Values of the profile to change; what is left out stays.

    Raises:
        SpecError: more than 64 combinations, or a learning rate below the one that the cosine ends with.
        NothingTrained: every combination failed.
    """
    from llava_pipeline.stages.sweep import combinations, spec_with, swept

    spec = spec_of(profile, overrides)
    tried = combinations(spec, learning_rates, warmup_shares, seeds)
    run = begin_sweep(spec, tried, tags_of_flow_run())
    try:
        model = assemble_and_freeze(fetch_backbones(spec.backbones), spec.model)
        beginning = find_beginning(spec, model)
        data = validate_stream(model, spec.data, spec.evaluation.max_samples)
        trials = [try_one(run, model, data, beginning, spec_with(spec, one), one) for one in tried]
        found = swept(run, profile, spec, trials)
        record_sweep(run, found)
    except BaseException as error:  # one that ends this process too: MLflow would show the run as running for ever
        end(run.run_id, error)
        raise
    show_sweep(found)
    return found


def sweep_as_asked(
    profile: str, overrides: list[str], rates: list[float], warmups: list[float], seeds: list[int]
) -> Swept:  # fmt: skip
    """The same with changes of the profile as ``a.b=value``.

    Raises:
        SpecError: values out of range, or too many combinations.
    """
    own, wanted = (load_spec(profile, said).model_dump(mode="json") for said in ([], overrides))
    changes = {part: value for part, value in wanted.items() if value != own[part]}  # whole parts: no kind is missing
    try:
        return sweep(rates, warmups, seeds, profile, Changes.model_validate(changes))
    except (ParameterTypeError, ValidationError) as error:
        raise SpecError(" ".join(str(error).split())) from error


def try_one(
    run: SweepRun, model: AssembledModel, data: ValidatedData, beginning: Beginning | None, spec: RunSpec,
    combination: Combination,
) -> Trial:  # fmt: skip
    """Train and ask one combination; one that diverges costs the sweep nothing else."""
    run_id = begin_trial(run, spec, combination)
    try:
        projector = train_projector(model, data, spec.training, beginning)
        evaluation = evaluate_generations(projector, data.held_out, spec.evaluation)
        return record_trial(run, run_id, spec, combination, evaluation)
    except Diverged as error:
        end(run_id, error)
        return Trial(combination=combination, run_id=run_id, failure=str(error))
    except BaseException as error:
        end(run_id, error)
        raise


def end(run_id: str, error: BaseException) -> None:
    """End an MLflow run as failed, with what ended it."""
    from llava_pipeline.tracking import sweeps
    from llava_pipeline.tracking.settings import load_settings

    sweeps.fail(run_id, str(error) or type(error).__name__, load_settings())


def show_sweep(found: Swept) -> None:
    """The table and the way to MLflow's run on the flow run's page. A sweep is worth more than its page."""
    from llava_pipeline.stages.sweep import report
    from llava_pipeline.tracking.settings import load_settings, run_address

    try:
        create_markdown_artifact(report(found), key="sweep", description=found.night)
        page = run_address(load_settings(), found.experiment_id, found.run_id)
        told = f"The sweep, with a run for each of {len(found.trials)} combinations."
        create_link_artifact(page, link_text="the sweep in MLflow", key="mlflow-run", description=told)
    except Exception as error:
        log.warning("the sweep is not shown in Prefect: %s", error)
