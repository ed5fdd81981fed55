"""Findings of ``llava-pipeline doctor`` that only Prefect's client can ask for.

Nothing is written, and no server is started.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.automations import PREFIX, automations
from flows.devices import devices
from flows.installation import BLOCK, deployed, notification_block
from llava_pipeline.operations.finding import Finding, problem, warning, well
from llava_pipeline.operations.services import POOL

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

DEPLOYMENTS = (
    "evaluate-champion/weekly", "promote/promote", "rollback/rollback", "ship/hourly", "sweep/sweep",
    "train-projector/nightly",
)  # fmt: skip
NIGHTLY = "train-projector/nightly"
DEPLOY = "`llava-pipeline deploy`"
TELL = f"{DEPLOY} with --notify, so that somebody hears of a verdict or a failure"


def findings(api_url: str | None) -> list[Finding]:
    """What the Prefect server at an address holds; one warning where there is no server."""
    if api_url is None:
        return [warning("Prefect", "no Prefect server is configured, so nothing is scheduled", "`llava-pipeline up`")]
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: api_url, PREFECT_CLIENT_MAX_RETRIES: 1}),
        get_client(sync_client=True) as client,
    ):
        if (trouble := client.api_healthcheck()) is not None:
            remedy = "start it with `llava-pipeline up`, or correct prefect.api_url or PREFECT_API_URL"
            return [problem("Prefect", f"the server at {api_url} does not answer: {_line(trouble)}", remedy)]
        try:
            return [
                well("Prefect", f"the server at {api_url} answers"), _version(client), _pool(client),
                *_deployments(client), *_limits(client), _automations(client), _notification(client),
            ]  # fmt: skip
        except Exception as error:
            remedy = "check PREFECT_API_AUTH_STRING, and that server and client are of one version"
            return [problem("Prefect", f"the server at {api_url} refuses: {_line(error)}", remedy)]


def _version(client: SyncPrefectClient) -> Finding:
    import prefect

    server, own = client.api_version(), prefect.__version__
    if server == own:
        return well("Prefect's version", own)
    tell = warning if server.split(".")[0] == own.split(".")[0] else problem
    remedy = "install the same version on both sides, the server's first, after `llava-pipeline backup`"
    return tell("Prefect's version", f"the server has {server}, this client {own}", remedy)


def _pool(client: SyncPrefectClient) -> Finding:
    from prefect.client.schemas.objects import WorkerStatus
    from prefect.exceptions import ObjectNotFound

    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        return problem("work pool", f"{POOL!r} does not exist", DEPLOY)
    if pool.is_paused:
        return problem("work pool", f"{POOL!r} is paused", f"`prefect work-pool resume {POOL}`")
    online = [one.name for one in client.read_workers_for_work_pool(POOL) if one.status == WorkerStatus.ONLINE]
    if not online:
        return problem("work pool", f"{POOL!r} has no worker that is online", "`llava-pipeline worker`, or `up`")
    return well("work pool", f"{POOL!r} with {len(online)} workers online")


def _deployments(client: SyncPrefectClient) -> list[Finding]:
    there = {str(one["name"]): one["schedules"] for one in deployed(client)}
    missing = [name for name in DEPLOYMENTS if name not in there]
    if missing:
        return [problem("deployments", f"missing: {', '.join(missing)}", DEPLOY)]
    found = [well("deployments", f"all {len(DEPLOYMENTS)} are there")]
    if not there[NIGHTLY]:
        remedy = f"resume it on its page, or `prefect deployment resume {NIGHTLY}`"
        return [*found, problem("schedule", f"{NIGHTLY} has no active schedule", remedy)]
    told = ", ".join(f"{one['cron']} {one['timezone']}" for one in there[NIGHTLY])
    return [*found, well("schedule", f"{NIGHTLY} runs at {told}")]


def _limits(client: SyncPrefectClient) -> list[Finding]:
    there = {one.name: one for one in client.read_global_concurrency_limits(limit=200, offset=0)}
    found = []
    for name in devices():
        limit = there.get(name)
        if limit is None:
            found.append(problem("limit", f"{name} does not exist, so two trainings could share a device", DEPLOY))
        elif not limit.active or limit.limit != 1:
            told = f"{name} is {limit.limit}" + ("" if limit.active else " and not active")
            found.append(problem("limit", told, f"`prefect gcl update {name} --limit 1 --enable`"))
        else:
            found.append(well("limit", f"{name}, one at a time"))
    return found


def _automations(client: SyncPrefectClient) -> Finding:
    there = [one for one in client.read_automations() if one.name.startswith(PREFIX)]
    if not there:
        return problem("automations", "none, so runs that died are shown as running for ever", DEPLOY)
    names = {one.name for one in there}
    wanted = automations(notification_block(client, None))
    if missing := [one.name.removeprefix(PREFIX) for one in wanted if one.name not in names]:
        return problem("automations", f"missing: {', '.join(missing)}", DEPLOY)
    off = [one.name.removeprefix(PREFIX) for one in there if not one.enabled]
    if off:
        return problem("automations", f"switched off: {', '.join(off)}", "switch them on on Prefect's page Automations")
    return well("automations", f"{len(there)}, all enabled")


def _notification(client: SyncPrefectClient) -> Finding:
    blocks = client.read_block_documents()
    able = [one.name for one in blocks if one.block_schema and "notify" in one.block_schema.capabilities]
    if not able:
        return warning("notification", "no block, so nobody is told", TELL)
    if BLOCK not in able:
        return warning("notification", f"no block {BLOCK!r}; there are {', '.join(map(str, able))}", TELL)
    return well("notification", f"by the block {BLOCK!r}")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
