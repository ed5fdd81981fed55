"""One Prefect server for all flow tests, and a home of the pipeline for each module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A real Prefect API on loopback with a database of its own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Iterator[Path]:
    """An empty home, a working directory without an mlflow.yml, and an empty cache of results."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "work").mkdir()
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    # The harness has read the environment already: without this all modules would share one cache of results.
    own = temporary_settings({PREFECT_LOCAL_STORAGE_PATH: str(folder / "results")})
    with own, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_PIPELINE_HOME", str(folder))
        patch.setenv("PREFECT_LOCAL_STORAGE_PATH", str(folder / "results"))
        patch.chdir(folder / "work")
        yield folder
