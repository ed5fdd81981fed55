"""Before there is anything to serve. Apart: whoever waits needs no model, and holds no memory for one."""

from __future__ import annotations

import logging
import time

from llava_pipeline.errors import TrackingError
from llava_pipeline.tracking import bundle, registry
from llava_pipeline.tracking.settings import Settings

log = logging.getLogger(__name__)


def wait_for_alias(registered_model: str, alias: str, settings: Settings, seconds: float) -> None:
    """Return when there is something to serve; look every so many seconds. MLflow may be away meanwhile."""
    told = False
    while bundle.kept(registered_model, alias) is None:
        try:
            if alias in registry.aliases(registered_model, settings):
                return
            problem = "nothing is registered under it yet"
        except TrackingError as error:
            problem = str(error)
        if not told:
            log.info("waiting for %s of %s: %s", alias, registered_model, problem)
        told = True
        time.sleep(seconds)
