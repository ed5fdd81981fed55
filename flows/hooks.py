"""What happens around a flow run: runs of dead processes are ended before it, and a run that fails says why."""

from __future__ import annotations

from typing import Any

from flows.form import spec_of_parameters


def sweep(flow: Any, flow_run: Any, state: Any) -> None:
    """End the MLflow runs of processes that were killed, before another one begins."""
    from llava_pipeline.tracking.settings import load_settings
    from llava_pipeline.tracking.stale import sweep_stale

    sweep_stale(load_settings())


def mark_cancelled(flow: Any, flow_run: Any, state: Any) -> None:
    """What a person has cancelled is not recorded in the morning either."""
    from llava_pipeline.tracking import spool

    spool.forget({"prefect.flow_run_id": str(flow_run.id)})
    mark_failed(flow, flow_run, state)


def mark_failed(flow: Any, flow_run: Any, state: Any) -> None:
    """Leave a failed MLflow run with the reason, so that a night that died is seen where people look."""
    from llava_pipeline.tracking.run import record_failure
    from llava_pipeline.tracking.settings import load_settings

    spec = spec_of_parameters(flow_run.parameters)
    began = (flow_run.start_time or flow_run.expected_start_time).timestamp()
    tags = {"prefect.flow_run_id": str(flow_run.id)}
    record_failure(spec, state.message or "unknown", load_settings(), tags, started=began)


HOOKS: dict[str, Any] = {
    "on_running": [sweep],
    "on_failure": [mark_failed],
    "on_crashed": [mark_failed],
    "on_cancellation": [mark_cancelled],
}
