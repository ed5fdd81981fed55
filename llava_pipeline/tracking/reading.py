"""How far a model has read a source: kept as tags of every finished run, so that the next night goes on behind it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError

from llava_pipeline.contracts import AssembledModel, Cursor
from llava_pipeline.errors import TrackingError
from llava_pipeline.tracking.client import connect, find_experiment, refusals

if TYPE_CHECKING:
    from llava_pipeline.tracking.settings import Settings

CURSOR = "llava.data.cursor"
READING = "llava.data.reading"


def reading_id(model: AssembledModel, origin: str) -> str:
    """Of a model and a source at one revision: another model, or another revision, begins at the beginning."""
    return hashlib.sha256(f"{model.frozen_digest}\n{model.chat_template_digest}\n{origin}".encode()).hexdigest()[:32]


class LastRead(NamedTuple):
    """How far a run has read, and when that run began, in seconds since the epoch."""

    cursor: Cursor
    began: float


def last_read(settings: Settings, model: AssembledModel, origin: str) -> LastRead | None:
    """How far the newest finished run of this model on this source has read; None where there is none.

    The newest is the one that began last: a night that waited for MLflow ends after the next one.

    Raises:
        TrackingError: MLflow cannot be reached, refuses, or holds a place that cannot be read.
    """
    with refusals("look up where the last run stopped reading"):
        client = connect(settings)
        if (experiment := find_experiment(client, settings)) is None:
            return None
        asked = f"tags.`{READING}` = '{reading_id(model, origin)}' and attributes.status = 'FINISHED'"
        found = client.search_runs(
            [experiment.experiment_id], filter_string=asked, order_by=["attributes.start_time DESC"], max_results=1
        )
    if not found:
        return None
    try:
        cursor = Cursor.model_validate_json(found[0].data.tags.get(CURSOR, ""))
    except ValidationError as error:
        raise TrackingError(
            f"run {found[0].info.run_id} does not tell where it stopped reading {origin}; "
            f"mend its tag {CURSOR}, or start over with --set data.increment=false"
        ) from error
    return LastRead(cursor, found[0].info.start_time / 1000)
