"""Findings about MLflow, about who serves, and about what could be done through the servers by others."""

from __future__ import annotations

import ipaddress
import os
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import requests

from llava_pipeline.operations import services
from llava_pipeline.operations.finding import Finding, problem, warning, well
from llava_pipeline.tracking import health
from llava_pipeline.tracking.settings import FILE_VARIABLE, Settings

SECONDS = 5.0
CLOCK_WARNING, CLOCK_PROBLEM = 10.0, 300.0  # S3 refuses requests that are fifteen minutes off
UP = "start it with `llava-pipeline up`"


def of_mlflow(settings: Settings, found: health.Health) -> list[Finding]:
    """Reachable, of a version that fits, with the experiment, and without runs that nobody ends."""
    if found.refused is not None:
        remedy = f"{UP}, or see what its log says"
        if found.is_outdated:
            remedy = "`llava-pipeline backup`, then `mlflow db upgrade` with the address of the database"
        return [problem("MLflow", found.refused, remedy)]
    if not found.has_records:
        return [warning("MLflow", f"nothing is recorded yet in {found.address}", "`llava-pipeline run`")]
    kind = "the server" if found.is_server else "the database"
    return [
        well("MLflow", f"{kind} at {found.address} answers"),
        *_version(found),
        _experiment(settings, found),
        _stale(found),
    ]


def _version(found: health.Health) -> list[Finding]:
    server, client = found.server_version, found.client_version
    if not found.is_server:
        return [well("MLflow's schema", f"up to date with MLflow {client}")]
    if server is None:
        return [warning("MLflow's version", "the server does not tell its version", "see what answers at its address")]
    if server == client:
        return [well("MLflow's version", server)]
    remedy = "install the same version on both sides, the server's first, after `llava-pipeline backup`"
    tell = warning if server.split(".")[0] == client.split(".")[0] else problem
    return [tell("MLflow's version", f"the server has {server}, this client {client}", remedy)]


def _experiment(settings: Settings, found: health.Health) -> Finding:
    name = settings.tracking.experiment
    if found.experiment is None:
        return warning("experiment", f"{name!r} is not there yet", "none: the first run makes it")
    if found.experiment != "active":
        remedy = "`mlflow experiments restore`, or another tracking.experiment in mlflow.yml"
        return problem("experiment", f"{name!r} was deleted", remedy)
    return well("experiment", name)


def _stale(found: health.Health) -> Finding:
    if not found.stale:
        return well("running runs", "none whose process is gone")
    told = f"{len(found.stale)} shown as running whose process is gone: {', '.join(found.stale[:3])}"
    remedy = "none for those of this machine: the next run ends them; end another machine's on MLflow's pages"
    return warning("running runs", told, remedy)


def serving(settings: Settings, registered_model: str, found: health.Health) -> Finding:
    """Whether who serves answers with the champion of the registry."""
    name, url = "serving", settings.serving.ready_url
    champion = found.champions.get(registered_model)
    if url is None:
        return warning(name, "nothing is known to serve", "`llava-pipeline up`, or serving.ready_url in mlflow.yml")
    remedy = "see its log; `llava-pipeline up` starts it again where it has ended"
    try:
        told = requests.get(url, timeout=SECONDS).json()
        model, version = told["model"], told["version"]
    except (requests.RequestException, ValueError, KeyError, TypeError):
        if champion is None and found.refused is None:
            return well(name, f"{registered_model} has no champion yet, so nothing answers at {url}")
        return problem(name, f"{url} does not say what it serves", remedy)
    if model != registered_model:
        told_ = f"{url} serves {model}, not {registered_model}"
        return warning(name, told_, "name the --profile that is served, or serve this one")
    if found.refused is not None:
        return warning(
            name, f"version {version} answers; MLflow cannot be asked who is champion", "see MLflow's finding"
        )
    if version != champion:
        found_ = f"version {version} answers, the champion is {champion or 'nobody'}"
        why = told.get("last_error")
        return problem(name, f"{found_}; it says: {why}" if why else found_, f"wait for its next look; then {remedy}")
    return well(name, f"version {version} of {model} answers, the champion")


def clock(urls: list[str]) -> Finding:
    """This machine's clock against that of the first server that answers."""
    for url in urls:
        asked = time.time()
        try:
            date = requests.head(url, timeout=SECONDS).headers["Date"]
            there = parsedate_to_datetime(date).timestamp()
        except (requests.RequestException, KeyError, ValueError):
            continue
        # A Date header has whole seconds, so the middle of one is compared.
        apart = abs(there + 0.5 - (asked + time.time()) / 2)
        where = urlsplit(url).hostname
        remedy = "set it by a time server (systemd-timesyncd, chrony), on both machines"
        if apart > CLOCK_PROBLEM:
            return problem("clock", f"{apart:.0f} s apart from that of {where}", remedy)
        if apart > CLOCK_WARNING:
            return warning("clock", f"{apart:.0f} s apart from that of {where}", remedy)
        return well("clock", f"agrees with that of {where}")
    return well("clock", "no server to compare with")


def security(settings: Settings) -> list[Finding]:
    """What others could reach, and with which login."""
    server, prefect, serves = settings.server, settings.prefect, settings.serving
    login = services.LOGIN_VARIABLE
    open_to_others = {
        "MLflow": (server.host, server.auth, "server.host: 127.0.0.1, or server.auth: true behind TLS"),
        "Prefect": (prefect.host, bool(os.environ.get(login)), f"prefect.host: 127.0.0.1, or {login}"),
        "serving": (serves.host, serves.keys is not None, "serving.host: 127.0.0.1, or serving.keys"),
    }  # fmt: skip
    found = [
        problem(f"security: {name}", f"listens on {host} and asks for no login", f"{remedy}, in mlflow.yml")
        for name, (host, is_guarded, remedy) in open_to_others.items()
        if not is_loopback(host) and not is_guarded
    ]
    if any(host in ("*", "*:*") for host in server.allowed_hosts):
        told = "answers every Host header, so a web page can drive it"
        found.append(problem("security: MLflow", told, "name the hosts in server.allowed_hosts"))
    if server.jobs:
        told = "runs background jobs, which load code that others have uploaded"
        found.append(warning("security: MLflow", told, "server.jobs: false, unless judges are used"))
    found += [finding for path in _secret_files(settings) if (finding := _readable(path)) is not None]
    return found or [well("security", "every server is bound to loopback or asks for a login")]


def _secret_files(settings: Settings) -> list[Path]:
    """Files that hold a password or a key's hash."""
    places = (settings.server.backend_store_uri, settings.prefect.database_url, settings.tracking.uri)
    has_password = any(urlsplit(place).password for place in places if place)
    known = [services.places().get(FILE_VARIABLE) if has_password else None, settings.serving.keys]
    return [Path(path).expanduser() for path in known if path is not None]


def _readable(path: Path) -> Finding | None:
    if not path.exists() or not path.stat().st_mode & 0o077:
        return None
    told = f"{path} holds secrets, and others on this machine may read it"
    return warning("security: files", told, f"chmod 600 {path}; a password is better kept in the environment")


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_here(url: str) -> bool:
    """Whether a server is one of this machine."""
    return is_loopback(urlsplit(url).hostname or "")
