"""``llava-pipeline up | down | status``: from nothing to a working installation, and back.

What runs already is left alone, so that ``up`` said again starts what has died.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from llava_pipeline.addresses import Addresses, forget_addresses, read_addresses, write_addresses
from llava_pipeline.errors import AddressRefused, SpecError
from llava_pipeline.operations import processes
from llava_pipeline.operations.services import places
from llava_pipeline.spec import Frozen
from llava_pipeline.tracking.client import locked
from llava_pipeline.tracking.settings import API_VARIABLE, URI_VARIABLE, Settings, without_login

log = logging.getLogger(__name__)
SECONDS_TO_START = 150.0
SECONDS_TO_FAIL = 3.0  # what worker and serving refuse, they refuse at once
SERVICES = ("mlflow", "prefect", "worker", "serving")
State = Literal["up", "starting", "waiting", "down"]


class ServiceStatus(Frozen):
    """One service."""

    name: str
    state: State
    told: str  # for people
    url: str | None  # its page
    pid: int | None


def address(host: str, port: int) -> str:
    """Where a client of this machine finds a server."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reached}:{port}"


def addresses_of(settings: Settings, profile: str, registered_model: str, with_serving: bool) -> Addresses:
    """Where the servers of these settings will be."""
    serving = address(settings.serving.host, settings.serving.port) if with_serving else None
    return Addresses(
        mlflow=address(settings.server.host, settings.server.port),
        prefect=f"{address(settings.prefect.host, settings.prefect.port)}/api",
        serving=serving, profile=profile, registered_model=registered_model,
    )  # fmt: skip


def up(
    settings: Settings, profile: str, registered_model: str, with_serving: bool, deploy: Callable[[Settings], None]
) -> list[ServiceStatus]:
    """Start what does not run yet: MLflow and Prefect together, then what is deployed on them, then worker and serving.

    Args:
        settings: of ``mlflow.yml``.
        profile: whose champion is served: a name, or the path of a file.
        registered_model: of the profile.
        with_serving: whether anything is served.
        deploy: makes deployments, limits and automations on the server of the settings that it is given.

    Raises:
        AddressRefused: somebody else listens on a port.
        NotStarted: a server has ended, or does not answer; what was started is ended again.
    """
    planned = addresses_of(settings, profile, registered_model, with_serving)
    _refuse_other_servers(settings, planned)
    with locked("services"):
        before = [name for name in SERVICES if processes.running(name) is not None]
        _refuse_other_installation(planned, before)
        _refuse_taken_ports(settings, with_serving, before)
        try:
            for name in ("mlflow", "prefect"):
                _start(name, [f"{name}-server"], before)
            processes.wait_until_ready("mlflow", f"{planned.mlflow}/health", SECONDS_TO_START)
            processes.wait_until_ready("prefect", f"{planned.prefect}/health", SECONDS_TO_START)
            write_addresses(planned)
            deploy(as_client(settings, planned))
            _start("worker", ["worker"], before)
            if with_serving:
                _start("serving", serving_arguments(settings, profile), before)
            time.sleep(SECONDS_TO_FAIL)
            for name in ("worker", *(["serving"] if with_serving else [])):
                processes.refuse_if_ended(name)
        except BaseException:
            processes.stop(name for name in reversed(SERVICES) if name not in before)
            if not before:
                forget_addresses()
            raise
    return status(settings)


def as_client(settings: Settings, addresses: Addresses) -> Settings:
    """The settings of whoever uses these servers."""
    return settings.model_copy(update={
        "tracking": settings.tracking.model_copy(update={"uri": addresses.mlflow}),
        "prefect": settings.prefect.model_copy(update={"api_url": addresses.prefect}),
    })  # fmt: skip


def serving_arguments(settings: Settings, profile: str) -> list[str]:
    """What ``up`` says to ``llava-pipeline``, so that a champion is served as soon as there is one."""
    keys = [] if settings.serving.keys is None else ["--keys", settings.serving.keys]
    server = settings.serving
    return [
        *("serve", "--wait", "--profile", profile, "--host", server.host, "--port", str(server.port)), *keys,
    ]  # fmt: skip


def down() -> list[str]:
    """End everything that ``up`` has started, the worker with its flow runs first; gives the names of what ran."""
    with locked("services"):
        ended = processes.stop(("worker", "serving", "prefect", "mlflow"))
        forget_addresses()
    return ended


def status(settings: Settings) -> list[ServiceStatus]:
    """How every service is."""
    known = read_addresses()
    found = []
    for name in SERVICES:
        process = processes.running(name)
        url = None if known is None else _page(name, known)
        state, told = _state(name, process is not None, url)
        found.append(
            ServiceStatus(name=name, state=state, told=told, url=url, pid=None if process is None else process.pid)
        )
    return found


def _page(name: str, known: Addresses) -> str | None:
    pages = {"mlflow": known.mlflow, "prefect": known.prefect.removesuffix("/api"), "serving": known.serving}
    return pages.get(name)


def _state(name: str, is_running: bool, url: str | None) -> tuple[State, str]:
    if not is_running:
        return "down", "not started" if not processes.log_of(name).exists() else f"ended; see {processes.log_of(name)}"
    if url is None:
        return "up", "runs what is scheduled"
    probe = {"mlflow": "/health", "prefect": "/api/health", "serving": "/readyz"}[name]
    if processes.answers(url + probe):
        return "up", "answers"
    if name == "serving" and not processes.answers(f"{url}/healthz"):
        return "waiting", "waits for a first champion, or loads it"
    return "starting", "does not answer yet"


def _start(name: str, arguments: list[str], before: list[str]) -> None:
    if name not in before:
        log.info("starting %s ...", name)
        command = [str(Path(sys.executable).with_name("llava-pipeline")), *arguments]
        processes.start(name, command, places())


def _refuse_other_servers(settings: Settings, planned: Addresses) -> None:
    named = [
        (URI_VARIABLE, "tracking.uri", settings.tracking.uri, planned.mlflow),
        (API_VARIABLE, "prefect.api_url", settings.prefect.api_url, planned.prefect),
    ]
    for variable, key, url, own in named:
        if url not in (None, own):
            raise SpecError(
                f"{variable} or {key} names {without_login(str(url))}, and `up` starts a server of its own at {own}; "
                "unset it, or start only a worker and serving beside that server (`llava-pipeline worker`, `serve`)"
            )


def _refuse_other_installation(planned: Addresses, before: list[str]) -> None:
    known = read_addresses()
    if before and known is not None and known != planned:
        raise AddressRefused(
            f"this home is up already, with other addresses or another profile ({known.profile}); "
            "say `llava-pipeline down` first"
        )


def _refuse_taken_ports(settings: Settings, with_serving: bool, before: list[str]) -> None:
    wanted = [
        ("mlflow", "server", settings.server.host, settings.server.port),
        ("prefect", "prefect", settings.prefect.host, settings.prefect.port),
        *([("serving", "serving", settings.serving.host, settings.serving.port)] if with_serving else []),
    ]
    for name, section, host, port in wanted:
        if name not in before and processes.is_taken(host, port):
            raise AddressRefused(
                f"something else listens on {host}:{port} already, where {name} would; end it, "
                f"or set another {section}.port in mlflow.yml"
            )
