"""``mlflow.yml``: servers, tracking, registry and gate. Every key has a default; an unknown key is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from llava_pipeline import store
from llava_pipeline.addresses import read_addresses
from llava_pipeline.errors import SpecError
from llava_pipeline.spec import Frozen

FILE = "mlflow.yml"
FILE_VARIABLE = "LLAVA_PIPELINE_SETTINGS"
URI_VARIABLE = "MLFLOW_TRACKING_URI"
API_VARIABLE = "PREFECT_API_URL"
DATABASE_VARIABLE, ARTIFACTS_VARIABLE = "MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION"


def _not_reserved(alias: str) -> str:
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise ValueError("MLflow reserves latest and v1, v2, ...")
    return alias


Port = Annotated[int, Field(ge=1, le=65535)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Alias = Annotated[str, Field(pattern=r"^[a-zA-Z][a-zA-Z0-9_-]{0,63}$"), AfterValidator(_not_reserved)]


class ServerSettings(Frozen):
    """How a tracking server is started."""

    backend_store_uri: str | None = Field(None, description="Database of the server; null is mlflow.db in the home.")
    artifacts_destination: str | None = Field(
        None, description="Where the server keeps artifacts; null is mlartifacts in the home."
    )
    host: str = Field("127.0.0.1", description="Address the server listens on.")
    port: Port = Field(5000, description="Port the server listens on.")
    workers: int = Field(1, ge=1, description="Processes that answer requests.")
    allowed_hosts: tuple[str, ...] = Field(
        ("localhost:*", "127.0.0.1:*"), min_length=1, description="Host headers that are answered; others get a 403."
    )
    jobs: bool = Field(False, description="Whether background jobs run; only judges need them.")
    auth: bool = Field(False, description="Whether a login is asked for, with MLflow's own list of people.")


class TrackingSettings(Frozen):
    """Where runs are recorded."""

    uri: str | None = Field(None, description="Tracking store or server; null is sqlite mlflow.db in the home.")
    experiment: str = Field(
        "llava-pipeline", min_length=1, max_length=500, description="Experiment that holds the runs."
    )
    timeout_seconds: float = Field(10.0, gt=0, description="How long a server may take to say that it is there.")


class RegistrySettings(Frozen):
    """Names of the aliases of a registered model."""

    champion: Alias = Field("champion", description="The version in use.")
    challenger: Alias = Field("challenger", description="The newest version that was not promoted.")
    previous: Alias = Field("previous", description="The champion before this one: where a rollback goes.")
    approval: Literal["automatic", "required"] = Field(
        "automatic", description="required: what passes the gate stays challenger until a person promotes it."
    )

    @model_validator(mode="after")
    def _are_different(self) -> RegistrySettings:
        if len({self.champion, self.challenger, self.previous}) < 3:
            raise ValueError("champion, challenger and previous must be three different names")
        return self


class PrefectSettings(Frozen):
    """Who schedules the flows, and how its server is started."""

    api_url: str | None = Field(
        None, pattern=r"^https?://.*/api/?$", description="Its API; null: the server that `up` starts, or none."
    )
    host: str = Field("127.0.0.1", description="Address the server listens on.")
    port: Port = Field(4200, description="Port the server listens on.")
    database_url: str | None = Field(None, description="Database of the server; null is prefect.db in the home.")


class ServingSettings(Frozen):
    """Who answers with the champion, for a promotion that waits until it does, and how it is started."""

    host: str = Field("127.0.0.1", description="Address it listens on; others than loopback want keys.")
    port: Port = Field(8000, description="Port it listens on.")
    keys: str | None = Field(None, description="File of API keys, made by `key`; null: none is asked for.")
    ready_url: str | None = Field(
        None, pattern=r"^https?://", description="Its /readyz; null: that of `up`, or a promotion waits for nobody."
    )
    registered_model: str | None = Field(None, description="Whose versions it answers with; null: any model's.")
    timeout_seconds: float = Field(60.0, gt=0, description="How long it may take to report the new champion.")


class GateSettings(Frozen):
    """What a projector must reach to become champion; "surely" means that the whole 95 % interval does.

    A likelihood is that of the true answer, the geometric mean over its tokens.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    min_grounding_gain: float = Field(
        0.02,
        ge=0,
        description="Nats per token that the right picture must gain over another one, and over none: surely.",
    )
    min_over_untrained: Share = Field(
        0.02, description="Likelihood that training must have gained over the first projector: surely."
    )
    min_over_blind: Share = Field(
        0.02, description="Exact matches above the best answer without any picture, where most answers are short."
    )
    max_empty: Share = Field(0.02, description="Share of answers that may be empty.")
    max_repeating: Share = Field(0.05, description="Share of answers that may run into a loop.")
    max_unended: Share = Field(0.25, description="Share of short answers that may miss their end of text.")
    min_over_champion: Share = Field(0.0, description="Likelihood that must be gained over the champion: surely.")
    max_regression: Share = Field(0.005, description="Exact matches that may be lost against the champion.")
    max_kind_regression: Share = Field(
        0.05, description="Likelihood (surely) and exact matches that one kind may lose against the champion."
    )
    max_seconds_per_answer: float | None = Field(None, gt=0, description="Most seconds an answer may take; null: any.")
    max_memory_gb: float | None = Field(None, gt=0, description="Most memory the evaluation may take; null: any.")
    max_training_minutes: float | None = Field(None, gt=0, description="Most minutes of training; null: any.")
    max_training_cost: float | None = Field(None, gt=0, description="Most that training may cost; null: any.")


class UiSettings(Frozen):
    """Where MLflow's pages over the tracked runs are served to one person."""

    host: str = Field("127.0.0.1", description="Address the pages are served on.")
    port: Port = Field(5001, description="Port the pages are served on.")


class Settings(Frozen):
    """The whole of mlflow.yml."""

    server: ServerSettings = Field(ServerSettings(), description="How a tracking server is started.")
    tracking: TrackingSettings = Field(TrackingSettings(), description="Where runs are recorded.")
    registry: RegistrySettings = Field(RegistrySettings(), description="Names of the aliases.")
    prefect: PrefectSettings = Field(PrefectSettings(), description="Who schedules the flows.")
    serving: ServingSettings = Field(ServingSettings(), description="Who answers with the champion.")
    gate: GateSettings = Field(GateSettings(), description="What a projector must reach to become champion.")
    ui: UiSettings = Field(UiSettings(), description="Where MLflow's pages are served to one person.")


def load_settings(path: Path | None = None) -> Settings:
    """The settings of a file: ``path``, else ``$LLAVA_PIPELINE_SETTINGS``, else ./mlflow.yml, else the defaults.

    ``$MLFLOW_TRACKING_URI`` wins over ``tracking.uri``, and ``$PREFECT_API_URL`` over ``prefect.api_url``. What is then
    still unsaid are the servers that ``llava-pipeline up`` has started, where it has.

    Raises:
        SpecError: the file cannot be read, has an unknown key or a value out of range.
    """
    chosen = path or _from_environment()
    if chosen is None and Path(FILE).is_file():
        chosen = Path(FILE)
    settings = Settings() if chosen is None else _parse(_read(chosen), str(chosen))
    up = read_addresses()
    uri = os.environ.get(URI_VARIABLE) or settings.tracking.uri or (up and up.mlflow)
    api = os.environ.get(API_VARIABLE) or settings.prefect.api_url or (up and up.prefect)
    serving = {}
    if settings.serving.ready_url is None and up is not None and up.serving is not None:
        serving = {"ready_url": f"{up.serving}/readyz", "registered_model": up.registered_model}
    return settings.model_copy(update={
        "tracking": settings.tracking.model_copy(update={"uri": uri}),
        "prefect": settings.prefect.model_copy(update={"api_url": api}),
        "serving": settings.serving.model_copy(update=serving),
    })  # fmt: skip


def ready_url_of(name: str, settings: Settings) -> str | None:
    """Where serving tells which version of a registered model it answers with; None where nothing serves it."""
    serving = settings.serving
    return serving.ready_url if serving.registered_model in (None, name) else None


def tracking_uri(settings: Settings) -> str:
    """Where runs are recorded: ``tracking.uri``, or the database in the home."""
    return settings.tracking.uri or _local_database()


def is_server(uri: str) -> bool:
    """Whether a tracking address is a server's, and not a database's."""
    return uri.startswith(("http://", "https://"))


def database_path(uri: str) -> Path | None:
    """The file of an ``sqlite:///`` address, or None for every other address."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).absolute() if uri.startswith(prefix) else None


def server_command(settings: Settings) -> list[str]:
    """The command that starts the tracking server of ``server:``.

    Database and artifacts that the environment names are left to it. So is an address with a password: everybody on a
    machine can read a command line.
    """
    server = settings.server
    database = server.backend_store_uri or _local_database()
    artifacts = server.artifacts_destination or (store.home() / "mlartifacts").as_uri()
    by_environment = os.environ.get(DATABASE_VARIABLE) or has_login(database)
    return [
        *("mlflow", "server"),
        *(() if by_environment else ("--backend-store-uri", database)),
        *(() if os.environ.get(ARTIFACTS_VARIABLE) else ("--artifacts-destination", artifacts)),
        *("--host", server.host, "--port", str(server.port)),
        *("--workers", str(server.workers)),
        *("--allowed-hosts", ",".join(server.allowed_hosts)),
        *(("--app-name", "basic-auth") if server.auth else ()),
    ]


def ui_command(settings: Settings) -> list[str]:
    """The command that serves MLflow's pages over the database that runs are recorded in.

    Raises:
        SpecError: runs are recorded by a server, which has its own pages.
    """
    uri = tracking_uri(settings)
    if is_server(uri):
        raise SpecError(f"runs are recorded by the server at {uri}, which serves the pages itself; open that address")
    host, port = settings.ui.host, str(settings.ui.port)
    return ["mlflow", "ui", "--backend-store-uri", uri, "--host", host, "--port", port, "--workers", "1"]


def run_address(settings: Settings, experiment_id: str, run_id: str) -> str:
    """Where a run's page is: on the server, or where ``ui_command`` serves it."""
    uri = tracking_uri(settings)
    pages = without_login(uri).rstrip("/") if is_server(uri) else f"http://{settings.ui.host}:{settings.ui.port}"
    return f"{pages}/#/experiments/{experiment_id}/runs/{run_id}"


def has_login(uri: str) -> bool:
    """Whether an address holds a name or a password."""
    return "@" in urlsplit(uri).netloc


def without_login(uri: str) -> str:
    """An address as it may be shown: it may hold a password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def server_environment(settings: Settings) -> dict[str, str]:
    """Environment variables for ``server_command`` and ``ui_command``."""
    return {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": str(settings.server.jobs).lower(),
        "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **_database_with_login(settings),
        **({"MLFLOW_AUTH_CONFIG_PATH": str(auth_file())} if settings.server.auth else {}),
    }


def _database_with_login(settings: Settings) -> dict[str, str]:
    uri = settings.server.backend_store_uri
    named = uri is not None and has_login(uri) and not os.environ.get(DATABASE_VARIABLE)
    return {DATABASE_VARIABLE: str(uri)} if named else {}


def auth_file() -> Path:
    """MLflow's settings of its logins, which say where the list of people is."""
    return store.home() / "services" / "mlflow-auth.ini"


def _local_database() -> str:
    return f"sqlite:///{store.home() / 'mlflow.db'}"


def _from_environment() -> Path | None:
    value = os.environ.get(FILE_VARIABLE)
    return Path(value) if value else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise SpecError(
            f"cannot read the settings file {path} ({why}); check the path or unset {FILE_VARIABLE}"
        ) from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SpecError(f"{path} must be a mapping of keys to values, not {type(content).__name__}")
    return content


def _parse(content: dict[str, Any], where: str) -> Settings:
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise SpecError(f"{where}: " + "; ".join(_explain(error))) from error


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "the file"
        if problem["type"] == "extra_forbidden":
            known = ", ".join(_known_keys(problem["loc"][:-1]))
            lines.append(f"{key}: unknown key; known here: {known}; correct or remove it")
        else:
            lines.append(
                f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]} (found {problem['input']!r}); correct it"
            )
    return lines


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
