"""A whole installation in a folder of its own, by the commands that people type, on free ports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import psutil
import requests
import yaml
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.events.schemas.automations import AutomationCore

from llava_pipeline.addresses import Addresses

T = TypeVar("T")
COMMAND = Path(sys.executable).with_name("llava-pipeline")
OURS = ("LLAVA_PIPELINE", "MLFLOW", "PREFECT", "_MLFLOW")
NIGHT_SECONDS, UP_SECONDS = 280, 240
MODEL = "llava-projector-pocket"


class Receiver:
    """Whoever is told: keeps what is posted."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        texts = self.texts

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                texts.append(json.loads(body)["text"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def wait_for(self, *words: str, seconds: float = 60.0) -> str:
        """The first text that has all the words."""
        return wait_until(
            lambda: next((text for text in self.texts if all(word in text for word in words)), None),
            seconds, f"{words} among {self.texts}",
        )  # fmt: skip

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Installation:
    """Commands given in one folder, and clients of what they start."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        folder.mkdir(parents=True, exist_ok=True)
        self.ports = dict(zip(("server", "prefect", "serving"), free_ports(3), strict=True))
        settings = {section: {"port": port} for section, port in self.ports.items()}
        (folder / "mlflow.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        self.receiver = Receiver()

    def environment(self, **more: str) -> dict[str, str]:
        """As a person's shell has it: nothing of the tests' own homes."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        own = {"LLAVA_PIPELINE_HOME": str(self.home), "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
        return kept | own | more

    def say(
        self, *arguments: str, seconds: float = UP_SECONDS, expect: int | None = 0, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """``llava-pipeline ...`` in the folder."""
        done = subprocess.run(
            [str(COMMAND), *arguments], cwd=self.folder, env=self.environment(**more), text=True, capture_output=True,
            timeout=seconds,
        )  # fmt: skip
        assert expect is None or done.returncode == expect, (
            f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def json(self, *arguments: str, **more: Any) -> Any:
        return json.loads(self.say(*arguments, "--json", **more).stdout.splitlines()[-1])

    def up(self) -> dict[str, dict[str, Any]]:
        """Start what is not up; the services by name."""
        found = self.json("up", "--notify", self.receiver.url)
        return {one["name"]: one for one in found["services"]}

    @property
    def addresses(self) -> Addresses:
        return Addresses.model_validate_json((self.home / "services" / "addresses.json").read_text(encoding="utf-8"))

    def pid(self, service: str) -> int:
        return int(json.loads((self.home / "services" / f"{service}.json").read_text(encoding="utf-8"))["pid"])

    def kill(self, service: str) -> None:
        """As a power cut would: the process and all that it has started, at once."""
        process = psutil.Process(self.pid(service))
        for one in [process, *process.children(recursive=True)]:
            try:
                one.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs([process], 30)

    def mlflow(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.addresses.mlflow, registry_uri=self.addresses.mlflow)

    def prefect(self) -> SyncPrefectClient:
        return SyncPrefectClient(self.addresses.prefect)

    # ------------------------------------------------------------------------------------------------------- nights

    def begin(self, deployment: str, **parameters: Any) -> UUID:
        """Ask for a run of a deployment now, as its page does."""
        with self.prefect() as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(found.id, parameters=parameters).id

    def hasten(self, automation: str, seconds: float) -> None:
        """Let an automation wait for so many seconds only, until `up` is said again."""
        with self.prefect() as client:
            (there,) = client.read_automations_by_name(automation)
            hasty = there.trigger.model_dump() | {"within": timedelta(seconds=seconds)}
            kept = there.model_dump(include={"name", "actions", "enabled"})
            core = AutomationCore.model_validate(kept | {"trigger": hasty})
            client.update_automation(there.id, core)

    def flow_run(self, flow_run_id: UUID) -> FlowRun:
        with self.prefect() as client:
            return client.read_flow_run(flow_run_id)

    def end(self, flow_run_id: UUID, seconds: float = NIGHT_SECONDS) -> FlowRun:
        """Wait for its end."""

        def ended() -> FlowRun | None:
            found = self.flow_run(flow_run_id)
            return found if found.state is not None and found.state.is_final() else None

        return wait_until(ended, seconds, f"{flow_run_id} does not end; {self.said('worker')[-2000:]}")

    def night(self, **overrides: Any) -> FlowRun:
        """A whole night of the pocket profile, with short parts."""
        return self.end(self.begin("train-projector/nightly", profile="pocket", overrides=short(**overrides)))

    def wait_for_training(self, flow_run_id: UUID, step: int = 3) -> Path:
        """The folder of a training that has taken some steps and written a checkpoint."""

        def at_it() -> Path | None:
            flow_run = self.flow_run(flow_run_id)
            state, began = flow_run.state, flow_run.start_time
            assert state is not None
            assert not state.is_final(), f"{state}; {self.said('worker')[-2000:]}"
            for told in self.home.glob("training/*/told.jsonl"):
                written = [one for one in told.parent.glob("checkpoints/[0-9]*") if one.is_dir()]
                is_its_own = began is not None and told.stat().st_mtime > began.timestamp()  # not one cut off before
                if is_its_own and written and len(told.read_text(encoding="utf-8").splitlines()) >= step:
                    return told.parent
            return None

        return wait_until(at_it, NIGHT_SECONDS, "no training begins")

    def processes_of(self, flow_run_id: UUID) -> list[psutil.Process]:
        """The process of a flow run first, then those below it."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("PREFECT__FLOW_RUN_ID") == str(flow_run_id) and "prefect" in " ".join(
                    process.cmdline()
                ):
                    return [process, *process.children(recursive=True)]
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        raise AssertionError(f"no process of {flow_run_id}")

    def runs(self) -> list[Any]:
        """All runs in MLflow, the oldest first."""
        client = self.mlflow()
        experiment = client.get_experiment_by_name("llava-pipeline")
        return list(reversed(client.search_runs([experiment.experiment_id]))) if experiment else []

    def aliases(self) -> dict[str, str]:
        return {name: str(version) for name, version in self.mlflow().get_registered_model(MODEL).aliases.items()}

    def served(self) -> str | None:
        """The version that answers."""
        try:
            told = requests.get(f"{self.addresses.serving}/readyz", timeout=5).json()
        except (requests.RequestException, ValueError):
            return None
        return None if told["version"] is None else str(told["version"])

    def wait_for_serving(self, version: str, seconds: float = 90) -> None:
        wait_until(lambda: self.served() == version or None, seconds, f"version {version}; {self.said('serving')}")

    def said(self, service: str) -> str:
        log = self.home / "services" / f"{service}.log"
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def left(self) -> list[psutil.Process]:
        """Processes that know this home."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("LLAVA_PIPELINE_HOME") == str(self.home):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def short(**more: Any) -> dict[str, Any]:
    """Overrides of the pocket profile that make a night of half a minute."""
    base: dict[str, Any] = {
        "data": {"increment": True, "max_samples": 640},
        "training": {
            "max_steps": 40,
            "device": "cpu",
            "samples_per_step": 32,
            "held_out_samples": 0,
            "checkpoint_seconds": 5,
        },
        "evaluation": {"max_samples": 120, "num_pictures": 4},
    }
    for section, values in more.items():
        base[section] = base[section] | values
    return base


@contextmanager
def installed(folder: Path) -> Iterator[Installation]:
    """An installation that is up; nothing is left of it afterwards."""
    made = Installation(folder)
    try:
        made.up()
        yield made
    finally:
        made.say("down", expect=None)
        made.receiver.close()
        for process in made.left():
            process.kill()


def wait_until(what: Callable[[], T | None], seconds: float, otherwise: str) -> T:
    """The first answer that is not None."""
    deadline = time.monotonic() + seconds
    while (found := what()) is None:
        assert time.monotonic() < deadline, f"after {seconds:g} s: {otherwise}"
        time.sleep(0.5)
    return found


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
