"""The command line called in this process, as its entry point is, with an empty home."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llava_pipeline.cli import main


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    exit_code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The JSON document on the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def error(self) -> str:
        """What follows ``error:``; a stack trace before it fails the test."""
        assert "Traceback" not in self.err
        line = self.err.strip().splitlines()[-1]
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


Command = Callable[..., Ended]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home, and a working directory without an mlflow.yml."""
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLAVA_PIPELINE_DEBUG", "")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    logger = logging.getLogger("llava_pipeline")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield tmp_path / "home"
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``llava-pipeline`` with arguments."""

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["llava-pipeline", *arguments])
        capsys.readouterr()
        try:
            main()
            exit_code = 0
        except SystemExit as stop:
            exit_code = int(stop.code or 0)
        return Ended(exit_code, *capsys.readouterr())

    return call
