"""One row per stage: the library's function, its retries, its time limit, and whether its result is reused.

A result is reused when the inputs, the code the stage can reach and the libraries beneath it are the same. Stages
that read a folder or a branch name may find other bytes there tomorrow, so they are run again; the gate depends on
who is champion now, so it is never reused.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefect import Task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import INPUTS, NO_CACHE, CachePolicy
from prefect.context import TaskRunContext
from prefect.runtime import flow_run
from prefect.tasks import exponential_backoff
from pydantic import BaseModel

from flows.devices import Device, device_held
from flows.following import followers
from flows.links import show_run, tags_of_flow_run
from flows.retries import will_pass
from flows.telling import tell_verdict
from flows.workers import validate_with_workers
from llava_pipeline.code_digest import code_digest
from llava_pipeline.contracts import (
    ArtifactRef,
    AssembledModel,
    Backbones,
    Beginning,
    Evaluation,
    Evidence,
    RecordedRun,
    Snapshot,
    TrainedProjector,
    ValidatedData,
    Verdict,
)
from llava_pipeline.errors import StoreError
from llava_pipeline.spec import (
    BackbonesSpec,
    DataSpec,
    EvaluationSpec,
    FolderBackbone,
    FolderSource,
    HubSource,
    JsonlSource,
    LlavaJsonSource,
    ModelSpec,
    ParquetSource,
    RunSpec,
    TrainingSpec,
    WebDatasetSource,
    WorkersSpec,
)
from llava_pipeline.store import open_artifact

if TYPE_CHECKING:
    from llava_pipeline.tracking.spool import Spooled

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger("llava_pipeline.flow")
MINUTE = 60
ON_THIS_MACHINE = (ParquetSource, JsonlSource, LlavaJsonSource, WebDatasetSource, FolderSource)


def may_change_underneath(value: Any) -> bool:
    """Whether an input names bytes that its own value does not fix: a folder, a branch, an increment."""
    if isinstance(value, BackbonesSpec):
        parts = (value.vision_tower, value.language_model)
        return value.source is not None or any(isinstance(part, FolderBackbone) for part in parts)
    if isinstance(value, EvaluationSpec):
        return value.picture is not None
    if isinstance(value, DataSpec):
        branch = isinstance(value.source, HubSource) and len(value.source.revision) != 40
        return value.increment or branch or isinstance(value.source, ON_THIS_MACHINE)
    return False


def what_decides(value: Any) -> Any:
    """An input without what its result does not depend on: who checks the rows, how long a source is asked."""
    if isinstance(value, DataSpec):
        return value.model_copy(update={"workers": WorkersSpec(), "patience_seconds": 0.0})
    return value


@dataclass
class SameInputsSameCode(CachePolicy):
    """Prefect's INPUTS, and a digest of every module the stage can reach: Prefect's own looks at one function only."""

    module: str = ""

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str | None:
        """The key, or None (run it) where an input may change underneath."""
        if any(may_change_underneath(value) for value in inputs.values()):
            return None
        deciding = {name: what_decides(value) for name, value in inputs.items()}
        return f"{INPUTS.compute_key(task_ctx, deciding, flow_parameters, **kwargs)}-{code_digest(self.module)}"


def missing_artifacts(result: Any) -> str | None:
    """What a reused result refers to and the store does not hold whole, in words; None where all is there."""
    if isinstance(result, ArtifactRef):
        try:
            open_artifact(result)
        except StoreError as error:
            return str(error).split(";")[0]
    if isinstance(result, BaseModel):
        return next(
            (lost for name in type(result).model_fields if (lost := missing_artifacts(getattr(result, name)))), None
        )
    return None


def stage(
    module: str, minutes: float, retries: int = 0, reuse: bool = True, device: Callable[..., Device] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a Prefect task of a stage, and tell when its result is reused.

    ``device`` says what the stage computes on, by its arguments; waiting until that is free is none of its time.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        prefect_task = Task(
            function,
            name=function.__name__.replace("_", "-"),
            retries=retries,
            retry_delay_seconds=exponential_backoff(5),
            retry_jitter_factor=0.5,
            retry_condition_fn=will_pass,
            timeout_seconds=minutes * MINUTE,
            cache_policy=SameInputsSameCode(module=module) if reuse else NO_CACHE,
            persist_result=reuse,
            result_serializer="json",
            tags=["llava-pipeline"],
        )

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with nullcontext() if device is None else device_held(*device(*args, **kwargs)):
                state = prefect_task(*args, return_state=True, **kwargs)
                if state.name != "Cached":
                    return state.result()
                if lost := missing_artifacts(state.result()):
                    log.info("%s: nothing changed, but %s; it is made anew", prefect_task.name, lost)
                    return prefect_task.with_options(refresh_cache=True)(*args, **kwargs)
            log.info("%s: nothing changed, the earlier result is reused", prefect_task.name)
            return state.result()

        return call

    return decorate


@stage("llava_pipeline.stages.fetch", minutes=120)  # it asks again itself, for backbones.patience_seconds
def fetch_backbones(spec: BackbonesSpec) -> Backbones:
    from llava_pipeline.stages import fetch

    return fetch.fetch_backbones(spec)


@stage("llava_pipeline.stages.assemble", minutes=30)
def assemble_and_freeze(backbones: Backbones, spec: ModelSpec) -> AssembledModel:
    from llava_pipeline.stages import assemble

    return assemble.assemble_and_freeze(backbones, spec)


@stage("llava_pipeline.stages.validate", minutes=360)  # a piece is tried again itself
def validate_stream(model: AssembledModel, spec: DataSpec, num_held_out: int) -> ValidatedData:
    data = validate_with_workers(model, spec, num_held_out)
    show_report(data)
    return data


def show_report(data: ValidatedData) -> None:
    """The data report on the flow run's page in Prefect. A run is worth more than its report."""
    from llava_pipeline.data import report

    try:
        create_markdown_artifact(report.markdown(data), key="data-report", description="What was kept, and what not.")
    except Exception as error:
        log.warning("the data report is not shown in Prefect: %s", error)


@stage("llava_pipeline.stages.begin", minutes=30, retries=5, reuse=False)  # an alias may have moved
def find_beginning(spec: RunSpec, model: AssembledModel) -> Beginning | None:
    from llava_pipeline.stages import begin

    return begin.find_beginning(spec, model)


@stage(
    "llava_pipeline.stages.train", minutes=24 * 60, retries=3,  # it goes on where it was killed
    device=lambda model, data, spec, beginning: (spec.device, spec.num_processes),
)  # fmt: skip
def train_projector(
    model: AssembledModel, data: ValidatedData, spec: TrainingSpec, beginning: Beginning | None
) -> TrainedProjector:
    from llava_pipeline.stages import train

    with followers() as follow:
        return train.train_projector(model, data, spec, beginning, follow)


@stage(
    "llava_pipeline.stages.evaluate", minutes=240, device=lambda projector, held_out, spec: (projector.device, 1)
)  # fmt: skip
def evaluate_generations(projector: TrainedProjector, held_out: Snapshot, spec: EvaluationSpec) -> Evaluation:
    from llava_pipeline.stages import evaluate

    return evaluate.evaluate_generations(projector, held_out, spec)


@stage("llava_pipeline.stages.record", minutes=30, retries=5, reuse=False)  # for two and a half minutes
def record_run(spec: RunSpec, evaluation: Evaluation) -> RecordedRun:
    from llava_pipeline.tracking import spool

    began = flow_run.get_scheduled_start_time().timestamp()
    return recorded(spool.keep(spec, evaluation, tags_of_flow_run(), began))


@stage("llava_pipeline.stages.record", minutes=30, reuse=False)
def record_waiting(night: Spooled) -> RecordedRun:
    return recorded(night)


def recorded(night: Spooled) -> RecordedRun:
    """A night in MLflow, with a link to it on the flow run's page."""
    from llava_pipeline.stages import record

    run = record.record_run(night)
    show_run(run)
    return run


@stage(
    "llava_pipeline.stages.weigh", minutes=240, retries=5, reuse=False,
    device=lambda run: (run.evaluation.projector.device, 1),
)  # fmt: skip
def weigh_against_champion(run: RecordedRun) -> Evidence:
    from llava_pipeline.stages import weigh

    return weigh.weigh_against_champion(run)


@stage("llava_pipeline.stages.promote", minutes=30, retries=5, reuse=False)
def pass_gate_and_promote(run: RecordedRun, evidence: Evidence) -> Verdict:
    from llava_pipeline.stages import promote
    from llava_pipeline.tracking import spool
    from llava_pipeline.tracking.settings import load_settings
    from llava_pipeline.tracking.verdict import refused_before

    before = refused_before(run, load_settings())
    verdict = promote.pass_gate_and_promote(run, evidence, who=f"flow run {flow_run.get_name() or 'without a name'}")
    show_verdict(run, evidence, verdict)
    tell_verdict(run, verdict, before)
    spool.forget(tags_of_flow_run())
    return verdict


def show_verdict(run: RecordedRun, evidence: Evidence, verdict: Verdict) -> None:
    """The gate's report on the flow run's page in Prefect. A run is worth more than its report."""
    from llava_pipeline.tracking.verdict import report

    try:
        create_markdown_artifact(report(run, evidence, verdict.rules), key="verdict", description=verdict.decision)
    except Exception as error:
        log.warning("the verdict is not shown in Prefect: %s", error)
