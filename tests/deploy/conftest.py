"""Real servers of an installation, each started once: PostgreSQL, an S3 store, and a home with recorded versions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import command
from tests.deploy import postgres, recorded
from tests.deploy import s3 as stores
from tests.deploy.postgres import Cluster
from tests.deploy.s3 import S3
from tests.once import made_once
from tests.serving.served import copied

__all__ = ["command"]


@pytest.fixture(scope="session")
def recorded_home(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The home that nothing may change."""
    return made_once("recorded-home", recorded.make_home, tmp_path_factory, worker_id)


@pytest.fixture
def own_home(recorded_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it for one test, where every file is three days old."""
    folder = copied(recorded_home, tmp_path / "home")
    recorded.age(folder, days=3)
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(folder))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """PostgreSQL. Where there is none the tests that ask for it fail, and say how it is had."""
    if (why := postgres.missing()) is not None:
        pytest.fail(why)
    with postgres.cluster() as made:
        yield made


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 store."""
    with stores.s3() as made:
        yield made
