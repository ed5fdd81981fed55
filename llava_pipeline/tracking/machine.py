"""How busy the machine is while a projector trains: processor, memory, disk, network, and cards where there are any."""

from __future__ import annotations

from typing import Any

from llava_pipeline.tracking.content import Point


class Machine:
    """MLflow's own collectors of system metrics, without its monitor: that one ends at the first outage.

    Args:
        started: when the pipeline run began, in seconds since the epoch; the seconds since then are the points' steps,
            so that an attempt that goes on is drawn behind the one before it.
    """

    def __init__(self, started: float) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.started = started
        self.collectors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor(), *_cards()]  # type: ignore[no-untyped-call]

    def points(self, now: float) -> list[Point]:
        """What is in use at this moment."""
        found = []
        for collector in self.collectors:
            collector.collect_metrics()
            values = collector.aggregate_metrics()
            collector.clear_metrics()
            found += [Point(f"system/{key}", float(v), int(now - self.started), now) for key, v in values.items()]
        return found


def _cards() -> list[Any]:
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    try:
        return [GPUMonitor()]  # type: ignore[no-untyped-call]
    except (ImportError, RuntimeError):  # nvidia-ml-py is not installed, or there is no card
        return []
