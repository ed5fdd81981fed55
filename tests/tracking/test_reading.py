"""How far a source was read is kept with every finished run, and found again on a real MLflow."""

from __future__ import annotations

import pytest

from llava_pipeline.contracts import Cursor
from llava_pipeline.errors import TrackingError
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.reading import CURSOR, last_read
from llava_pipeline.tracking.run import record, record_failure
from llava_pipeline.tracking.settings import Settings
from tests.tracking.conftest import MakeEvaluation


def test_the_newest_finished_run_tells_where_it_stopped(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings
) -> None:
    evaluation = make_evaluation()
    train, model = evaluation.projector.data, evaluation.projector.model
    assert last_read(settings, model, train.origin) is None
    record(spec, evaluation, settings, {}, started=1_000.0)
    assert last_read(settings, model, train.origin)[0] == train.ended  # type: ignore[index]
    further = train.model_copy(update={"ended": Cursor(shard=2, row=7, behind="d" * 64)})
    projector = evaluation.projector.model_copy(update={"data": further})
    record(spec, evaluation.model_copy(update={"projector": projector}), settings, {}, started=2_000.0)
    record_failure(spec, "died", settings, {}, started=3_000.0)
    assert last_read(settings, model, train.origin)[0] == Cursor(shard=2, row=7, behind="d" * 64)  # type: ignore[index]


def test_another_revision_or_another_model_begins_at_the_beginning(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings
) -> None:
    evaluation = make_evaluation()
    train, model = evaluation.projector.data, evaluation.projector.model
    record(spec, evaluation, settings, {}, started=1_000.0)
    assert last_read(settings, model, train.origin + "@other") is None
    assert last_read(settings, model.model_copy(update={"frozen_digest": "0" * 64}), train.origin) is None


def test_a_place_that_cannot_be_read_is_told(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings
) -> None:
    evaluation = make_evaluation()
    run = record(spec, evaluation, settings, {}, started=1_000.0)
    connect(settings).set_tag(run.run_id, CURSOR, "somewhere")
    with pytest.raises(TrackingError, match=r"mend its tag llava\.data\.cursor, or start over with --set data\.incr"):
        last_read(settings, evaluation.projector.model, evaluation.projector.data.origin)
