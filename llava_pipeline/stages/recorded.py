"""What was recorded, asked and judged again: a run, version or alias on its own held-out set or on another one."""

from __future__ import annotations

import logging

from llava_pipeline.contracts import AssembledModel, Cursor, RecordedRun, Reexamined, Snapshot, Verdict
from llava_pipeline.data.snapshot import refuse_if_too_many
from llava_pipeline.data.sources import open_source
from llava_pipeline.data.sources.named import source_named
from llava_pipeline.errors import NothingToLearn, NotPromoted, SpecError, StoreError, TrackingError
from llava_pipeline.model import projector
from llava_pipeline.spec import DataSpec, RunSpec, ScenesSource, Source
from llava_pipeline.stages.assemble import assemble_and_freeze
from llava_pipeline.stages.examine import Examination, examined
from llava_pipeline.stages.fetch import fetch_backbones
from llava_pipeline.stages.promote import pass_gate_and_promote
from llava_pipeline.stages.validate import EVERYTHING, snapshot, workers
from llava_pipeline.stages.weigh import weigh_against_champion
from llava_pipeline.store import open_artifact
from llava_pipeline.tracking import registry
from llava_pipeline.tracking.settings import Settings

log = logging.getLogger(__name__)
OF_AN_ENDLESS_SOURCE = 1000


def evaluate_recorded(
    which: str, registered_model: str, on: str | None, images: str | None, limit: int | None, settings: Settings,
    *, afresh: bool = False,
) -> Reexamined:  # fmt: skip
    """Ask a recorded projector its own held-out questions, or those of the source that ``on`` means.

    A source with a split of its own is asked that; of every other one all rows are. What was asked before is answered
    from the store, unless it is to be asked ``afresh``.

    Raises:
        NoSuchRun: there is no such run, version or alias.
        NotFound, SpecError: no such source, or ``images`` or ``limit`` without one.
        SourceUnavailable, NothingToLearn, TooManyRejected: its rows cannot be had, or not be used.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    if on is None and (images is not None or limit is not None):
        raise SpecError("--images and --limit are about another source; name it with --on, or leave them out")
    source = None if on is None else source_named(on, images)
    run_id = registry.resolve(which, registered_model, settings)
    spec = registry.recorded_spec(run_id, None, settings)
    recorded = registry.recorded_evaluation(run_id, settings)
    trained = recorded.projector
    model = assemble_and_freeze(fetch_backbones(spec.backbones), spec.model)
    folder = registry.download_projector(run_id, None, settings)
    state = projector.load(folder, model)
    if source is None:
        held_out = own_held_out(recorded.held_out, model, spec)
    else:
        held_out = all_of(source, model, spec.data, limit)
    exam = Examination(model, held_out, spec.evaluation, trained.device, trained.precision)
    scored = exam.ask(which, trained.projector.digest, lambda: state, controls=True, afresh=afresh)
    return Reexamined(run_id=run_id, registered_model=registered_model, **examined(held_out, scored))


def judge_again(which: str, registered_model: str, who: str, settings: Settings) -> Verdict:
    """Weigh a version, or the one that an alias points to, against the champion of now; the gate decides as ever.

    Raises:
        NoSuchRun: there is no such version or alias.
        NotPromoted: it is champion, and there is nobody to weigh it against; see ``pass_gate_and_promote`` besides.
        TrackingError: MLflow cannot be reached, or refuses, or what is asked about is not to be had any more.
    """
    found = registry.aliases(registered_model, settings)
    version = found.get(which, which)
    if version == found.get(settings.registry.champion):
        raise NotPromoted(f"version {version} of {registered_model} is champion; it was judged when it became that")
    run_id = registry.run_of_version(registered_model, version, settings)
    recorded = registry.recorded_evaluation(run_id, settings)
    for ref in (recorded.scored.lines, recorded.held_out.rows):
        try:
            open_artifact(ref)
        except StoreError as error:
            raise TrackingError(f"version {version} cannot be judged on this machine: {error}") from error
    run = RecordedRun(
        run_id=run_id, experiment_id="", registered_model=registered_model, version=version, evaluation=recorded
    )
    return pass_gate_and_promote(run, weigh_against_champion(run), who)


def own_held_out(recorded: Snapshot, model: AssembledModel, spec: RunSpec) -> Snapshot:
    """The held-out rows of a run: from the store, or read again where they are gone; they must be the same ones.

    Raises:
        TrackingError: the source holds others now.
    """
    try:
        open_artifact(recorded.rows)
        return recorded
    except StoreError:
        log.info("the held-out rows are not in the store any more; they are read again")
    found = held_out_of(recorded.source, model, spec.data, spec.evaluation.max_samples)
    if found.rows.digest != recorded.rows.digest:
        raise TrackingError(
            f"{recorded.origin} holds other rows now than those that were asked ({found.rows.digest[:12]}, not "
            f"{recorded.rows.digest[:12]}); name a source to ask about with --on"
        )
    return found


def all_of(source: Source, model: AssembledModel, data: DataSpec, limit: int | None) -> Snapshot:
    """Every row of a source, or the first ``limit``; of a source with splits, of the one that is held out."""
    if limit is None and isinstance(source, ScenesSource):
        limit = OF_AN_ENDLESS_SOURCE
    everything = data.model_copy(update={"held_out_share": 1.0})
    found = held_out_of(source, model, everything, limit or EVERYTHING)
    refuse_if_too_many(found, data, at_end=True)
    if found.num_kept == 0:
        raise NothingToLearn(f"no row of {found.origin} can be asked; see `llava-pipeline validate`")
    return found


def held_out_of(source: Source, model: AssembledModel, data: DataSpec, wanted: int) -> Snapshot:
    """The held-out rows of a source alone."""
    spec = data.model_copy(update={"source": source})
    with workers(spec.workers) as submit:
        reader = open_source(source, "test", spec.patience_seconds)
        found, _ = snapshot(reader, "test", model, spec, wanted, Cursor(), None, submit)
    return found
