"""Who computes on a device holds it alone: one strict limit of Prefect's per card, or one for a machine without."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from llava_pipeline.tracking.client import locked

LEASE_SECONDS = 120.0  # so long a device stays taken by a run that was killed


def devices() -> list[str]:
    """Names of the limits of this machine: ``gpu-<uuid>`` of each card that may be used, or ``cpu-<host>``."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        listed = ""
    cards = [(index.strip(), uuid.strip()) for index, _, uuid in (line.partition(",") for line in listed.splitlines())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [name.strip() for name in visible.split(",")]
        cards = [
            card for card in cards if named and (card[0] in named or any(card[1].startswith(n) for n in named if n))
        ]
    return [f"gpu-{uuid.removeprefix('GPU-')}" for _, uuid in cards if uuid] or [cpu()]


def cpu() -> str:
    """The limit of a machine's processors."""
    return f"cpu-{socket.gethostname()}"


def ensure_limits(names: list[str]) -> None:
    """Make the limits that do not exist; one that a person has changed stays."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    with get_client(sync_client=True) as client:
        for name in names:
            try:
                client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                try:
                    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
                except ObjectAlreadyExists:  # another worker was faster
                    continue


Device = tuple[str, int | None]
"""cpu, or anything else for the cards where there are some; and how many of these, None for all."""


@contextmanager
def device_held(device: str = "auto", num: int | None = 1) -> Iterator[None]:
    """Wait until the devices that something computes on are free, and hold them.

    Only where a server of Prefect's schedules: the one that a run starts for itself ends with it, and could not free
    what a killed run holds. A lease that could not be renewed in time ends no training; whoever comes then finds the
    lock of this home still held, which the kernel frees when its process ends.
    """
    from prefect.concurrency.sync import concurrency
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value() is None:
        yield
        return
    names = [cpu()] if device.startswith("cpu") else devices()[:num]
    ensure_limits(names)
    limits = concurrency(names, lease_duration=LEASE_SECONDS, strict=True, raise_on_lease_renewal_failure=False)
    with limits, ExitStack() as stack:
        for name in sorted(names):
            stack.enter_context(locked(f"device-{name}"))
        yield
