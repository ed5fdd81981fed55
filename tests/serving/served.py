"""A real server over a real home: two versions of the pocket projector, the first one champion.

The first is trained for some steps, the second is the first with noise; both are evaluated and recorded as every run
is. They are made once for all processes of a test run; each test that changes anything has a copy.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from llava_pipeline import store
from llava_pipeline.contracts import Cursor, TrainedProjector
from llava_pipeline.model import projector
from llava_pipeline.spec import load_spec
from llava_pipeline.stages.assemble import assemble_and_freeze
from llava_pipeline.stages.evaluate import evaluate_generations
from llava_pipeline.stages.fetch import fetch_backbones
from llava_pipeline.stages.train import train_projector
from llava_pipeline.stages.validate import validate_stream
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.run import record
from llava_pipeline.tracking.settings import FILE_VARIABLE, URI_VARIABLE, Settings
from tests.once import made_once

COMMAND = Path(sys.executable).with_name("llava-pipeline")
NAME = "llava-projector-pocket"
SPEC = load_spec(
    "pocket",
    [
        *("data.max_samples=640", "evaluation.max_samples=60", "training.device=cpu"),
        *("training.max_steps=20", "training.samples_per_step=16"),
    ],
)
NOISE = 0.5
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)
START_SECONDS, END_SECONDS = 120, 60


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The home that nothing may change."""
    return made_once("trained-home", _train, tmp_path_factory, worker_id)


@pytest.fixture
def served_home(trained_home: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return copied(trained_home, tmp_path / "home")


def copied(home: Path, target: Path) -> Path:
    """A home of one's own; MLflow notes where artifacts are, so the addresses go along."""
    shutil.copytree(home, target)
    with sqlite3.connect(target / "mlflow.db") as database:
        for table, column in ADDRESSES:
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(home), str(target)))
    return target


def settings_of(home: Path) -> Settings:
    """Settings whose MLflow is that home's, whatever the environment says."""
    return Settings.model_validate({"tracking": {"uri": f"sqlite:///{home / 'mlflow.db'}"}})


def point(home: Path, alias: str, version: str) -> None:
    """Move an alias."""
    connect(settings_of(home)).set_registered_model_alias(NAME, alias, version)


def _train(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _train_in(folder, patch)


def _train_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "work").mkdir(exist_ok=True)
    patch.setenv("LLAVA_PIPELINE_HOME", str(folder))
    for variable in (URI_VARIABLE, FILE_VARIABLE, "MLFLOW_REGISTRY_URI"):
        patch.delenv(variable, raising=False)
    patch.chdir(folder / "work")
    model = assemble_and_freeze(fetch_backbones(SPEC.backbones), SPEC.model)
    data = validate_stream(model, SPEC.data, SPEC.evaluation.max_samples, lambda *_: Cursor())
    trained = train_projector(model, data, SPEC.training)
    for one in (trained, _with_noise(trained)):
        record(SPEC, evaluate_generations(one, data.held_out, SPEC.evaluation), Settings(), {})
    point(folder, "champion", "1")
    point(folder, "challenger", "2")
    shutil.rmtree(folder / "training", ignore_errors=True)


def _with_noise(trained: TrainedProjector) -> TrainedProjector:
    """One that answers otherwise, saved as every projector is."""
    state = projector.load(store.open_artifact(trained.projector), trained.model)
    generator = torch.Generator().manual_seed(1)
    noisy = {
        name: tensor + NOISE * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
    }
    with store.writing("projector") as (folder, done):
        projector.save(folder, noisy, trained.model, {})
    return trained.model_copy(update={"projector": done[0]})


@pytest.fixture(scope="session")
def shared_server(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """For tests that change nothing: champion and challenger."""
    home = copied(trained_home, tmp_path_factory.mktemp("shared") / "home")
    with serving(home, "--also", "challenger") as served:
        yield served


@dataclass
class Served:
    """A server that answers."""

    url: str
    version: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **more)

    def post(self, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60, **more)

    def ask(self, text: str = "Is there a circle?", picture: str | None = None, **more: Any) -> httpx.Response:
        """A question about a picture (a data URI), or about none."""
        content: Any = text
        if picture is not None:
            content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
        return self.post({"messages": [{"role": "user", "content": content}], "max_tokens": 8} | more)

    def ready(self) -> dict[str, Any]:
        return dict(self.get("/readyz").json())

    def wait_for(self, version: str, seconds: float = 30.0) -> None:
        until = time.monotonic() + seconds
        while (told := self.ready())["version"] != version:
            assert time.monotonic() < until, f"still {told}; {self.said()}"
            time.sleep(0.1)

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def end(self, seconds: float = END_SECONDS) -> int:
        """Ask it to end, and give its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextmanager
def serving(home: Path, *arguments: str, **environment: str) -> Iterator[Served]:
    """``llava-pipeline serve`` on a free port, with a look at the aliases every 0.3 s."""
    log = home / f"serve-{time.monotonic_ns()}.log"
    kept = {name: value for name, value in os.environ.items() if name not in (URI_VARIABLE, FILE_VARIABLE)}
    own = {"LLAVA_PIPELINE_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    command = [str(COMMAND), "serve", "--port", "0", "--poll", "0.3", "--json", *arguments]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, env=kept | own, cwd=home, stdout=subprocess.PIPE, stderr=errors)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, f"it did not start: {log.read_text()}"
        told = json.loads(line)
        yield Served(told["url"], told["version"], process, log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        process.stdout.close()


def data_uri(path: Path, kind: str = "image/png") -> str:
    """A picture as clients send it."""
    return f"data:{kind};base64,{b64encode(path.read_bytes()).decode()}"
