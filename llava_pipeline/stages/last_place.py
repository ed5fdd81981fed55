"""Where an increment begins: behind what the last finished run has read. Apart: checking rows needs no MLflow."""

from __future__ import annotations

import logging

from llava_pipeline.contracts import AssembledModel, Cursor
from llava_pipeline.tracking import spool
from llava_pipeline.tracking.reading import last_read
from llava_pipeline.tracking.settings import load_settings

log = logging.getLogger(__name__)


def where_the_last_run_stopped(model: AssembledModel, origin: str) -> Cursor:
    """The first row that no finished run of this model has read; the beginning where there was no such run.

    A night that waits for MLflow has read its rows too.

    Raises:
        TrackingError: MLflow cannot be reached, refuses, or holds a place that cannot be read.
    """
    known = [read for read in (spool.last_read(model, origin), last_read(load_settings(), model, origin)) if read]
    if not known:
        log.info("%s: no earlier run has read it", origin)
        return Cursor()
    cursor = max(known, key=lambda read: read.began).cursor
    log.info("%s: the last run stopped before shard %d, row %d", origin, cursor.shard, cursor.row)
    return cursor
