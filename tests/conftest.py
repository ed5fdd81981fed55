"""No test touches a person's own files: every home that a library would use lies in one temporary folder.

Set at import, because Prefect and huggingface_hub read some of these once, when they are imported.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEMPORARY = Path(tempfile.mkdtemp(prefix="llava-pipeline-tests-"))
atexit.register(shutil.rmtree, TEMPORARY, ignore_errors=True)
for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "PREFECT_API_URL", "PREFECT_PROFILE", "HF_ENDPOINT"):
    os.environ.pop(variable, None)
os.environ |= {
    "LLAVA_PIPELINE_HOME": str(TEMPORARY / "home"),
    "PREFECT_HOME": str(TEMPORARY / "prefect"),
    "HF_HOME": str(TEMPORARY / "huggingface"),
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
}


SLOW_ROOMS = ("flows", "evaluation", "training", "browser")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rooms whose files take minutes come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.path.parent.name not in SLOW_ROOMS)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session when something was written where people keep their own."""
    for path in (ROOT / "mlruns", ROOT / "mlflow.db", ROOT / "mlartifacts"):
        if path.exists() and path not in _there_before:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            print(f"\na test wrote {path}")


_there_before = {path for path in (ROOT / "mlruns", ROOT / "mlflow.db", ROOT / "mlartifacts") if path.exists()}
