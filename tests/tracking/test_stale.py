"""Runs of processes that were killed are ended, and nobody else's."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import get_context

import psutil
import pytest

from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.run import begin
from llava_pipeline.tracking.settings import Settings, TrackingSettings
from llava_pipeline.tracking.stale import PROCESS, sweep_stale, this_process

FORK = get_context("fork")  # MLflow takes seconds to import, and the parent has


def begin_run(spec: RunSpec, settings: Settings) -> str:
    return begin(connect(settings), spec, settings, {}, 1_000.0)[1]


def test_a_run_whose_process_was_killed_is_failed_with_the_reason(spec: RunSpec, settings: Settings) -> None:
    mine = begin_run(spec, settings)

    def begin_and_die() -> None:
        begin_run(spec, settings)
        os.kill(os.getpid(), signal.SIGKILL)

    child = FORK.Process(target=begin_and_die)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    client = connect(settings)
    (swept,) = sweep_stale(settings)
    assert swept != mine
    run = client.get_run(swept)
    assert run.info.status == "FAILED"
    assert run.data.tags["llava.failure"].startswith("its process ended without telling")
    assert client.get_run(mine).info.status == "RUNNING"
    assert sweep_stale(settings) == []


def test_another_hosts_run_and_a_reused_number_are_told_apart(spec: RunSpec, settings: Settings) -> None:
    client = connect(settings)
    elsewhere, reused, untold = (begin_run(spec, settings) for _ in range(3))
    host, number, began = this_process().split(":")
    client.set_tag(elsewhere, PROCESS, f"not-{host}:{number}:1.00")
    client.set_tag(reused, PROCESS, f"{host}:{number}:1{began}")
    client.delete_tag(untold, PROCESS)
    assert sweep_stale(settings) == [reused]


def test_a_clock_that_is_set_ends_no_run(spec: RunSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_run(spec, settings)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(psutil, "boot_time", lambda: 0.0)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 0.0)
    assert sweep_stale(settings) == []


def test_a_sweep_never_costs_a_run(home: object) -> None:
    assert sweep_stale(Settings(tracking=TrackingSettings(uri="http://127.0.0.1:9"))) == []
