"""``llava-pipeline doctor``: everything that a night needs, looked at without changing anything."""

from __future__ import annotations

from llava_pipeline.operations import machine, servers
from llava_pipeline.operations.finding import Finding
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import health
from llava_pipeline.tracking.settings import Settings, is_server, tracking_uri


def examine(settings: Settings, spec: RunSpec) -> list[Finding]:
    """What is found, but for what only Prefect's client can ask: see ``flows.findings``."""
    found = health.look(settings)
    return [
        *machine.of_this_machine(spec), machine.spool(), *servers.of_mlflow(settings, found),
        servers.serving(settings, spec.registered_model, found), servers.clock(to_compare_with(settings)),
        *servers.security(settings),
    ]  # fmt: skip


def to_compare_with(settings: Settings) -> list[str]:
    """Servers whose clock is compared with this machine's; those that run here have the same, and come last."""
    uri = tracking_uri(settings)
    known = [
        f"{uri.rstrip('/')}/health" if is_server(uri) else None,
        settings.prefect.api_url and f"{settings.prefect.api_url}/health",
    ]
    named = [url for url in known if url]
    away = [url for url in named if not servers.is_here(url)]
    return [*away, machine.hub_address(), *(url for url in named if url not in away)]
