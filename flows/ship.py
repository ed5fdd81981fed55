"""The morning after: what waits because MLflow was away is recorded, and the gate decides on it."""

from __future__ import annotations

import logging

import prefect

from flows.stages import pass_gate_and_promote, record_waiting, weigh_against_champion

log = logging.getLogger("llava_pipeline.flow")


@prefect.flow(name="ship")
def ship() -> int:
    """Record every night that waits, the oldest first; gives how many. Nothing is wrong while MLflow is still away.

    Raises:
        NotShipped: MLflow, or the gate's promotion, refuses one; it is put aside, the others are shipped.
    """
    from llava_pipeline.errors import LlavaPipelineError, NotShipped, TrackingUnavailable
    from llava_pipeline.tracking import spool

    nights = spool.waiting()
    problems: list[str] = []
    for number, night in enumerate(nights):
        try:
            run = record_waiting(night)
            pass_gate_and_promote(run, weigh_against_champion(run))
        except TrackingUnavailable as error:
            log.info("%d nights still wait: %s", len(nights) - number, error)
            return number - len(problems)
        except LlavaPipelineError as error:
            problems.append(f"{spool.refuse(night, str(error))}: {error}")
        else:
            spool.forget(night.tags)
    if problems:
        raise NotShipped("; ".join(problems) + "; mend what it says, and move it back into the folder above")
    return len(nights)
