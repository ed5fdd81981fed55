"""``llava-pipeline up | down | status | deploy | ship``, and each server by itself: what is needed every night."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava_pipeline.cli import show
from llava_pipeline.cli.app import YAML, AsJson, Profile, app, debugging, registered_model_of

if TYPE_CHECKING:
    from llava_pipeline.operations.bring_up import ServiceStatus
    from llava_pipeline.operations.services import Command
    from llava_pipeline.tracking.settings import Settings

NOTIFY_VARIABLE = "LLAVA_PIPELINE_NOTIFY"
Print = Annotated[bool, typer.Option("--print", help="Show the command and its variables, and start nothing.")]
Notify = Annotated[
    str | None,
    typer.Option("--notify", envvar=NOTIFY_VARIABLE, help="Webhook that is told verdicts and failures.", metavar="URL"),
]
Pool = Annotated[str, typer.Option("--pool", help="Where flow runs run: process, docker or kubernetes.")]


@app.command()
def up(
    profile: Profile = "pocket",
    serving: Annotated[bool, typer.Option("--serving/--no-serving", help="Whether the champion is served.")] = True,
    notify: Notify = None,
    as_json: AsJson = False,
) -> None:
    """Start MLflow, Prefect, a worker with its deployments, and serving; what runs already is left alone."""
    from llava_pipeline.operations import bring_up
    from llava_pipeline.tracking.settings import load_settings

    named = str(Path(profile).absolute()) if profile.endswith(YAML) else profile
    model = registered_model_of(profile)

    def deploy_on(settings: Settings) -> None:
        put_on_prefect(settings, "process", notify)

    found = bring_up.up(load_settings(), named, model, serving, deploy_on)
    told(found, as_json)


@app.command()
def down(as_json: AsJson = False) -> None:
    """End what `up` has started; a training that runs saves where it is."""
    from llava_pipeline.operations import bring_up

    ended = bring_up.down()
    show.document({"ended": ended}) if as_json else print(f"Ended: {', '.join(ended) or 'nothing was up'}.")


@app.command()
def status(as_json: AsJson = False) -> None:
    """What of an installation is up; exit code 1 where something that `up` has started is not."""
    from llava_pipeline.addresses import read_addresses
    from llava_pipeline.operations import bring_up
    from llava_pipeline.tracking.settings import load_settings

    found = bring_up.status(load_settings())
    told(found, as_json)
    known = read_addresses()
    expected = [one for one in found if one.name != "serving" or (known and known.serving)]
    if known is not None and any(one.state == "down" for one in expected):
        raise typer.Exit(1)


@app.command()
def deploy(pool: Pool = "process", notify: Notify = None, as_json: AsJson = False) -> None:
    """Make work pool, limits, automations and deployments on the Prefect server that is configured."""
    from llava_pipeline.errors import SpecError
    from llava_pipeline.tracking.settings import load_settings

    settings = load_settings()
    if settings.prefect.api_url is None:
        raise SpecError("no Prefect server is configured; say `llava-pipeline up`, or set PREFECT_API_URL")
    made = put_on_prefect(settings, pool, notify)
    if as_json:
        show.document(made)
        return
    from rich.console import Console

    table = show.table("deployment", "schedule")
    for one in made["deployments"]:
        schedules = [f"{each['cron']} {each['timezone']}" for each in one["schedules"]]
        table.add_row(one["name"], ", ".join(schedules) or "by hand")
    Console().print(table)
    print(f"Work pool {made['pool']} ({made['kind']}); one at a time on {', '.join(made['limits'])}.")
    print("People are told." if made["notifies"] else f"Nobody is told: say --notify URL, or set {NOTIFY_VARIABLE}.")


@app.command()
def ship(as_json: AsJson = False) -> None:
    """Record what waits because MLflow was away, and let the gate decide on it; a deployment does so every hour."""
    from flows.local import local_defaults

    local_defaults(debug=debugging())
    from flows.ship import ship as ship_waiting
    from llava_pipeline.tracking import spool

    shipped = ship_waiting()
    left = len(spool.waiting())
    if as_json:
        show.document({"shipped": shipped, "waiting": left})
    else:
        print(f"{shipped} recorded, {left} still waiting.")


@app.command(name="mlflow-server")
def mlflow_server(print_only: Print = False) -> None:
    """Be the tracking server that mlflow.yml describes."""
    from llava_pipeline.operations import services
    from llava_pipeline.tracking.settings import load_settings

    settings = load_settings()
    if settings.server.auth and not print_only:
        services.write_auth_file()
    run_or_print(services.mlflow_server(settings), print_only)


@app.command(name="prefect-server")
def prefect_server(print_only: Print = False) -> None:
    """Be the Prefect server that mlflow.yml describes."""
    from llava_pipeline.operations import services
    from llava_pipeline.tracking.settings import load_settings

    run_or_print(services.prefect_server(load_settings()), print_only)


@app.command()
def worker(print_only: Print = False) -> None:
    """Run on this machine what Prefect has scheduled."""
    from llava_pipeline.errors import SpecError
    from llava_pipeline.operations import services
    from llava_pipeline.tracking.settings import load_settings

    settings = load_settings()
    if settings.prefect.api_url is None:
        raise SpecError("no Prefect server is configured; say `llava-pipeline up`, or set PREFECT_API_URL")
    run_or_print(services.worker(settings), print_only)


# --------------------------------------------------------------------------------------------- what commands share


def put_on_prefect(settings: Settings, pool: str, notify: str | None) -> dict[str, Any]:
    """Deploy on the server of the settings. Prefect reads its address when it is imported."""
    from flows.local import local_defaults
    from llava_pipeline.errors import NotDeployed, SpecError

    if pool not in ("process", "docker", "kubernetes"):
        raise SpecError(f"--pool {pool}: flow runs run as process, docker or kubernetes jobs")
    os.environ["PREFECT_API_URL"] = str(settings.prefect.api_url)
    local_defaults(debug=debugging())
    from flows.installation import REFUSALS
    from flows.installation import deploy as deploy_on

    try:
        return deploy_on(pool, notify or None)  # type: ignore[arg-type]  # it has been checked
    except REFUSALS as error:
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise NotDeployed(f"Prefect at {settings.prefect.api_url} does not take it: {told}") from error


def run_or_print(command: Command, print_only: bool) -> None:
    """Become the command, or show it as a shell would take it, but for passwords."""
    from llava_pipeline.tracking.settings import without_login

    if not print_only:
        command.run()
    for name, value in sorted(command.environment.items()):
        print(f"{name}={shlex.quote(without_login(value))} \\")
    print(shlex.join(command.argv))


def told(found: list[ServiceStatus], as_json: bool) -> None:
    """Every service with its page."""
    if as_json:
        show.document({"services": [one.model_dump() for one in found]})
        return
    from rich.console import Console

    table = show.table("service", "state", "page", "")
    for column in table.columns:
        column.justify = "left"
    for one in found:
        table.add_row(one.name, one.state, one.url or "-", one.told)
    Console().print(table)
