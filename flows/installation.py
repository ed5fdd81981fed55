"""What a Prefect server has to hold before nights can be scheduled on it: pool, limits, automations, deployments.

Everything is made only where it is missing, or brought up to what this version says; saying it again is harmless.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

import httpx
from prefect.exceptions import PrefectException

from flows.devices import devices, ensure_limits
from llava_pipeline.errors import NotDeployed
from llava_pipeline.operations.services import POOL

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

log = logging.getLogger("llava_pipeline.flow")
PoolKind = Literal["process", "docker", "kubernetes"]
BLOCK = "llava-pipeline"
SECONDS_TO_DEPLOY = 600.0
REFUSALS = (PrefectException, httpx.HTTPError, OSError)  # that a server, or the way to it, answers with


def deploy(kind: PoolKind, notify: str | None) -> dict[str, Any]:
    """Make everything on the server of ``PREFECT_API_URL``, and tell what there is.

    Args:
        kind: where flow runs are run.
        notify: address that is sent ``{"text": ...}`` when something is to be told, as Slack, Mattermost and Discord
            take it; None leaves it as it is.

    Raises:
        NotDeployed: the server refuses, or the pool is of another kind.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        ensure_pool(client, kind)
        limits = devices()
        ensure_limits(limits)
        block = notification_block(client, notify)
        made = ensure_automations(client, block)
        deploy_all()
        return {
            "pool": POOL, "kind": kind, "limits": limits, "automations": made, "notifies": block is not None,
            "deployments": deployed(client),
        }  # fmt: skip


def files() -> Path:
    """The folder of what is deployed: beside the flows in an installed package, else that of the repository."""
    packaged = Path(__file__).parent / "deploy"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "deploy"


def ensure_pool(client: SyncPrefectClient, kind: PoolKind) -> None:
    """Make the work pool, with the template of its jobs.

    Raises:
        NotDeployed: there is one of another kind.
    """
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    template = None if kind == "process" else json.loads((files() / kind / "job-template.json").read_text("utf-8"))
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        given = {} if template is None else {"base_job_template": template}
        client.create_work_pool(WorkPoolCreate(name=POOL, type=kind, **given))
        return
    if pool.type != kind:
        raise NotDeployed(
            f"the work pool {POOL!r} runs {pool.type} jobs, not {kind} ones; delete it first with "
            f"`prefect work-pool delete {POOL}`, or say --pool {pool.type}"
        )
    if template is not None:
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))


def notification_block(client: SyncPrefectClient, notify: str | None) -> UUID | None:
    """Id of the block that people are told by; None where nobody has said whom to tell."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.exceptions import ObjectNotFound
    from prefect.types import SecretDict

    if notify is not None:
        block = CustomWebhookNotificationBlock(
            name="llava-pipeline",
            url="{{address}}",
            secrets=SecretDict({"address": notify}),
            json_data={"text": "{{subject}}\n{{body}}"},
        )
        return UUID(str(block.save(BLOCK, overwrite=True)))
    try:
        found = client.read_block_document_by_name(BLOCK, CustomWebhookNotificationBlock.get_block_type_slug())
    except ObjectNotFound:
        return None
    return found.id


def ensure_automations(client: SyncPrefectClient, block: UUID | None) -> list[str]:
    """Make the automations; what says something else under the same name is replaced, as enabled as it was."""
    from flows.automations import automations

    wanted = automations(block)
    for automation in wanted:
        _put(client, automation)
    return [automation.name for automation in wanted]


def _put(client: SyncPrefectClient, automation: AutomationCore) -> None:
    there = client.read_automations_by_name(automation.name)
    if not there:
        client.create_automation(automation)
        return
    if (there[0].trigger, there[0].actions) != (automation.trigger, automation.actions):
        # Not otherwise: Prefect then forgets what it waits for, as the heartbeat of a run whose worker has just died.
        client.update_automation(there[0].id, automation.model_copy(update={"enabled": there[0].enabled}))
    for double in there[1:]:
        client.delete_automation(double.id)


def deploy_all() -> None:
    """Say ``prefect deploy --all``.

    Raises:
        NotDeployed: with what Prefect said.
    """
    command = [
        "--no-prompt",
        "deploy",
        "--prefect-file",
        str(files() / "prefect.yaml"),
        "--all",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *command], capture_output=True, text=True, timeout=SECONDS_TO_DEPLOY,
    )  # fmt: skip
    log.debug("%s", done.stdout)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-500:]
        raise NotDeployed(f"`prefect {' '.join(command)}` ended with code {done.returncode}: {said}")


def deployed(client: SyncPrefectClient) -> list[dict[str, Any]]:
    """Every deployment of ours with its active schedules."""
    found = []
    for one in client.read_deployments():
        if "llava-pipeline" in one.tags:
            flow = client.read_flow(one.flow_id)
            schedules = [
                {"cron": getattr(each.schedule, "cron", None), "timezone": getattr(each.schedule, "timezone", None)}
                for each in one.schedules
                if each.active and not one.paused
            ]
            found.append({"name": f"{flow.name}/{one.name}", "schedules": schedules})
    return sorted(found, key=lambda one: str(one["name"]))
