"""The morning after: what waits because MLflow was away is recorded, and the gate decides on it."""

from __future__ import annotations

import logging

import prefect

from flows.retries import WORTH_ANOTHER_TRY
from flows.stages import pass_gate_and_promote, record_waiting, weigh_against_champion
from llava_pipeline.errors import BackboneUnavailable, DiskFull, LlavaPipelineError, NotShipped

log = logging.getLogger("llava_pipeline.flow")
WILL_PASS = (*WORTH_ANOTHER_TRY, BackboneUnavailable, DiskFull)


@prefect.flow(name="ship")
def ship() -> int:
    """Record every night that waits, the oldest first; gives how many. Nothing is wrong while MLflow is still away.

    Where another process of this home is at it already, this one leaves it to that.

    Raises:
        NotShipped: MLflow, or the gate's promotion, refuses one; it is put aside, the others are shipped.
    """
    from llava_pipeline.tracking import spool
    from llava_pipeline.tracking.client import locked

    shipped, problems = 0, list[str]()
    with locked("ship", wait=False) as is_alone:
        nights = spool.waiting() if is_alone else []
        for night in nights:
            try:
                run = record_waiting(night)
                pass_gate_and_promote(run, weigh_against_champion(run))
            except WILL_PASS as error:
                log.info("%d nights still wait: %s", len(nights) - shipped - len(problems), error)
                break
            except LlavaPipelineError as error:
                problems.append(f"{spool.refuse(night, str(error))}: {error}")
            else:
                spool.forget(night.tags)
                shipped += 1
    if problems:
        raise NotShipped("; ".join(problems) + "; mend what it says, and move it back into the folder above")
    return shipped
