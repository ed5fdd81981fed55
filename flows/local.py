"""Defaults for a machine without servers: everything below one folder, nothing reported to anyone.

Call ``local_defaults`` before prefect is imported. Whatever the environment already says wins, so the usual
``PREFECT_API_URL`` and ``MLFLOW_TRACKING_URI`` point the same flow at real servers.
"""

from __future__ import annotations

import os

from llava_pipeline.operations.services import HEARTBEAT_SECONDS
from llava_pipeline.store import home
from llava_pipeline.tracking.settings import load_settings


def local_defaults(debug: bool = False) -> None:
    """Set what is not set: Prefect's folder below ours, quiet logs, patience for slow starts, no telemetry."""
    level = "INFO" if debug else "CRITICAL"
    prefect_home = home() / "prefect"
    prefect_home.mkdir(parents=True, exist_ok=True)  # Prefect makes one folder only, and without it waits in vain
    api = load_settings().prefect.api_url
    for name, value in {
        **({} if api is None else {"PREFECT_API_URL": api}),
        "PREFECT_HOME": str(prefect_home),
        "PREFECT_LOGGING_LEVEL": level,
        "PREFECT_LOGGING_SERVER_LEVEL": "WARNING" if debug else "CRITICAL",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "llava_pipeline",
        # As of a worker: a run by hand on the same server would otherwise be taken for dead between two of them.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        os.environ.setdefault(name, value)
