"""What Prefect does by itself: it ends runs that died without a word, and tells people what they want to hear.

A verdict that is the same as the night before is told to nobody; see ``flows/telling.py``.
"""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from flows.telling import PROMOTED, REFUSED, WAITS
from llava_pipeline.operations.services import SILENT_SECONDS

PREFIX = "llava-pipeline: "
TAG = {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.llava-pipeline"}
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Cancelled", "Crashed")}
MISSED_MINUTES = 15
RUN = "{{ flow.name }} / {{ flow_run.name }}"
PAGE = "{{ flow_run|ui_url }}"


def automations(
    notify: UUID | None, missed_after: timedelta = timedelta(minutes=MISSED_MINUTES)
) -> list[AutomationCore]:
    """Everything that ``llava-pipeline deploy`` makes; what tells people only where it is known whom to tell.

    Args:
        notify: id of the notification block.
    """
    return [_dead()] if notify is None else [_dead(), *_told(notify)]


def _dead() -> AutomationCore:
    """A run whose process was killed sends no heartbeat any more, and is marked as crashed."""
    return AutomationCore(
        name=f"{PREFIX}a run without a heartbeat has crashed",
        trigger=EventTrigger(
            after={HEARTBEAT}, expect={HEARTBEAT} | ENDS, match=_any(), for_each={"prefect.resource.id"},
            posture=Posture.Proactive, threshold=1, within=timedelta(seconds=SILENT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(state=StateType.CRASHED, message="its process was killed: no heartbeat came any more")
        ],
    )  # fmt: skip


def _told(notify: UUID) -> list[AutomationCore]:
    message = f"{RUN}: {{{{ flow_run.state.message }}}}\n{PAGE}"
    return [
        _verdict("promoted", PROMOTED, notify),
        _verdict("refused", REFUSED, notify),
        _verdict("waits for approval", WAITS, notify),
        _when("failed", "prefect.flow-run.Failed", message, notify),
        _when("crashed", "prefect.flow-run.Crashed", message, notify),
        _when("cancelled", "prefect.flow-run.Cancelled", message, notify),
        _missed(notify),
    ]


def _verdict(name: str, event: str, notify: UUID) -> AutomationCore:
    return AutomationCore(
        name=f"{PREFIX}{name}",
        trigger=EventTrigger(
            expect={event}, match=_any("llava-pipeline.model.*"), posture=Posture.Reactive, threshold=1,
            within=timedelta(0),
        ),
        actions=[
            SendNotification(
                block_document_id=notify, subject="{{ event.payload.subject }}",
                body="{{ event.payload.sentence }}\n{{ event.payload.page }}",
            )
        ],
    )  # fmt: skip


def _when(name: str, event: str, body: str, notify: UUID) -> AutomationCore:
    return AutomationCore(
        name=f"{PREFIX}{name}",
        trigger=EventTrigger(
            expect={event}, match=_any(), match_related=ResourceSpecification.model_validate(TAG),
            posture=Posture.Reactive, threshold=1, within=timedelta(0),
        ),
        actions=[SendNotification(block_document_id=notify, subject=f"{{{{ flow.name }}}} {name}", body=body)],
    )  # fmt: skip


def _missed(notify: UUID) -> AutomationCore:
    """A run that was due, or taken by a worker, and has not begun: no worker is there, all are busy, or one died."""
    return AutomationCore(
        name=f"{PREFIX}missed",
        trigger=EventTrigger(
            after={"prefect.flow-run.Late", "prefect.flow-run.Pending"}, expect={"prefect.flow-run.Running"} | ENDS,
            match=_any(), match_related=ResourceSpecification.model_validate(TAG), for_each={"prefect.resource.id"},
            posture=Posture.Proactive, threshold=1, within=timedelta(minutes=MISSED_MINUTES),
        ),
        actions=[
            SendNotification(
                block_document_id=notify, subject="{{ flow.name }} missed",
                body=f"{RUN} was due and has not begun: no worker takes it. Is one up? `llava-pipeline status`\n{PAGE}",
            )
        ],
    )  # fmt: skip


def _any(resource: str = "prefect.flow-run.*") -> ResourceSpecification:
    return ResourceSpecification.model_validate({"prefect.resource.id": resource})
