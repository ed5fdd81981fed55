"""A real MLflow server, started by the command that the settings give."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_pipeline.errors import TrackingError
from llava_pipeline.tracking.client import check_reachable
from llava_pipeline.tracking.settings import (
    ServerSettings,
    Settings,
    TrackingSettings,
    server_command,
    server_environment,
)

BOOT_SECONDS = 120


class Server:
    """``mlflow server`` on one port and one database, killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as opened:
            opened.bind(("127.0.0.1", 0))
            self.port = opened.getsockname()[1]
        server = ServerSettings(
            port=self.port, backend_store_uri=f"sqlite:///{folder / 'mlflow.db'}",
            artifacts_destination=(folder / "mlartifacts").as_uri(),
        )  # fmt: skip
        self.as_server = Settings(server=server)
        self.settings = Settings(tracking=TrackingSettings(uri=f"http://127.0.0.1:{self.port}"))
        self.process: subprocess.Popen[bytes] | None = None
        self.returning: threading.Thread | None = None
        self.outages: list[float] = []

    def start(self) -> None:
        """Start it, and wait until it answers."""
        executable, *arguments = server_command(self.as_server)
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name(executable)), *arguments],
            env=os.environ | server_environment(self.as_server), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + BOOT_SECONDS
        while not self.answers():
            assert self.process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.1)

    def answers(self) -> bool:
        """Whether it is there."""
        try:
            check_reachable(self.settings)
        except TrackingError:
            return False
        return True

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the process and its workers."""
        assert self.process is not None
        os.killpg(self.process.pid, how)
        self.process.wait(30)

    def away(self, seconds: float) -> None:
        """Kill it now, and start it again after so many seconds, while the caller goes on."""
        self.back()
        self.kill()
        began = time.monotonic()

        def come_back() -> None:
            time.sleep(seconds)
            self.start()
            self.outages.append(time.monotonic() - began)

        self.returning = threading.Thread(target=come_back)
        self.returning.start()

    def back(self) -> None:
        """Wait until it is there again."""
        if self.returning is not None:
            self.returning.join(BOOT_SECONDS + 120)


@contextmanager
def running(folder: Path) -> Iterator[Settings]:
    """Settings of a client of a server over the database and the artifacts of a folder."""
    server = Server(folder)
    server.start()
    try:
        yield server.settings
    finally:
        server.kill(signal.SIGTERM)
