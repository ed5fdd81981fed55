"""The servers of an installation, by ``mlflow.yml``: which command each one is, and how it tells that it is there.

``llava-pipeline up``, the compose file and the Kubernetes manifests start the same commands.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llava_pipeline import store
from llava_pipeline.errors import SpecError
from llava_pipeline.spec import Frozen
from llava_pipeline.tracking.settings import (
    FILE,
    FILE_VARIABLE,
    Settings,
    auth_file,
    server_command,
    server_environment,
)

POOL = "llava-pipeline"
NIGHTS_AT_ONCE = 4  # flow runs of one worker; who trains holds the device alone
HEARTBEAT_SECONDS = 30
SILENT_SECONDS = 300  # longer than a restart of Prefect's server takes: whoever lives is heard of in between
LOGIN_VARIABLE = "PREFECT_SERVER_API_AUTH_STRING"
DATABASE_VARIABLE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
EVENTS_DAYS, FLOW_RUNS_DAYS = 7, 90


class Command(Frozen):
    """A program with the variables that it is started with, besides those of this process."""

    argv: tuple[str, ...]
    environment: dict[str, str]

    def run(self) -> None:
        """Become this program; does not return."""
        executable = Path(sys.executable).with_name(self.argv[0])
        program = str(executable) if executable.exists() else self.argv[0]
        os.execvpe(program, list(self.argv), os.environ | self.environment)


def mlflow_server(settings: Settings) -> Command:
    """The tracking server. With logins, the file that says where their list is has been written."""
    return Command(argv=tuple(server_command(settings)), environment=server_environment(settings))


def write_auth_file() -> None:
    """Where MLflow keeps its list of people: in the home, like everything else. It holds no password."""
    lines = [
        "[mlflow]", "default_permission = READ", f"database_uri = sqlite:///{people_file()}", "admin_username = admin",
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
    ]  # fmt: skip
    store.write_text(auth_file(), "\n".join(lines) + "\n")


def people_file() -> Path:
    """MLflow's list of people, with what their passwords were made into."""
    return store.home() / "services" / "mlflow-people.db"


def prefect_server(settings: Settings) -> Command:
    """The server that schedules. What a person has set in the environment stays.

    Raises:
        SpecError: a login was to be asked for and is empty; the server would then ask for none.
    """
    server = settings.prefect
    if os.environ.get(LOGIN_VARIABLE) == "":
        raise SpecError(f"{LOGIN_VARIABLE} is set and empty; set it to name:password, or unset it to ask for no login")
    own = {
        **prefect_environment(),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"http://{server.host}:{server.port}",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # In files: a server that is started again knows who holds a device, and frees what nobody renews.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": f"P{FLOW_RUNS_DAYS}D",
        # After a night without power it is still known who was to be heard of, and was not.
        "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": f"P{EVENTS_DAYS}D",
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"P{EVENTS_DAYS}D",
    }
    if server.database_url is not None:
        own[DATABASE_VARIABLE] = server.database_url
    return Command(
        argv=("prefect", "server", "start", "--host", server.host, "--port", str(server.port)), environment=unset(own)
    )


def worker(settings: Settings) -> Command:
    """Who runs what is scheduled, on this machine."""
    return Command(
        argv=(
            *("prefect", "worker", "start", "--pool", POOL, "--type", "process"),
            *("--limit", str(NIGHTS_AT_ONCE), "--install-policy", "never"),
        ),
        environment=unset(prefect_environment()) | flow_environment(settings),
    )


def prefect_environment() -> dict[str, str]:
    """For everything of Prefect that this home starts."""
    return {"PREFECT_HOME": str(store.home() / "prefect"), "DO_NOT_TRACK": "1", "PREFECT_LOGGING_LEVEL": "INFO"}


def flow_environment(settings: Settings) -> dict[str, str]:
    """What a flow run has to know that starts in a folder of its own: absolute places, and where the servers are."""
    known = {
        **places(),
        "PREFECT_API_URL": settings.prefect.api_url,
        "MLFLOW_TRACKING_URI": settings.tracking.uri,
        "PREFECT_LOGGING_EXTRA_LOGGERS": "llava_pipeline",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return {name: value for name, value in known.items() if value is not None}


def places() -> dict[str, str]:
    """This home and this settings file, for a process that starts in another folder."""
    file = Path(os.environ.get(FILE_VARIABLE) or FILE).absolute()
    return {"LLAVA_PIPELINE_HOME": str(store.home())} | ({FILE_VARIABLE: str(file)} if file.is_file() else {})


def unset(variables: dict[str, str]) -> dict[str, str]:
    """Those that the environment does not say already."""
    return {name: value for name, value in variables.items() if name not in os.environ}
