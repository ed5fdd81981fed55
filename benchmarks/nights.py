"""Nights of a real installation: how long it takes to be up, what a night costs besides training, and what grows.

    python -m benchmarks.nights --nights 20 --json

Starts MLflow, Prefect, a worker and serving by `llava-pipeline up` in a temporary folder, runs nights of the profile
`tiny` one after the other through the deployment, and then two of `pocket`; the last one finds its caches warm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.__main__ import machine
from tests.deploy.installation import Installation

RESULTS = Path(__file__).parent / "results" / "nights.json"
DAYS = 3 * 24 * 60 * 60


def main() -> None:
    """Measure, write the raw numbers, and say the few that matter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print the raw numbers")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nights-") as folder:
        made = Installation(Path(folder))
        try:
            found = measure(made, asked.nights)
        finally:
            made.say("down", expect=None)
            made.receiver.close()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found) if asked.json else found["summary"])


def measure(made: Installation, number: int) -> dict[str, Any]:
    began = time.monotonic()
    made.up()
    seconds_up = time.monotonic() - began
    tiny = [night(made, "tiny", n) for n in range(number)]
    pocket = [night(made, "pocket", n) for n in range(2)]
    before = disk(made.home)
    for path in made.home.rglob("*"):
        if not path.is_symlink() and "services" not in path.parts and path.suffix not in (".db", ".json", ".lock"):
            os.utime(path, (time.time() - DAYS, time.time() - DAYS))
    collected = made.json("gc", "--keep-runs", "2")
    after = disk(made.home)
    return {
        "machine": machine(), "seconds_up": round(seconds_up, 1), "tiny": tiny, "pocket": pocket,
        "gc": {"freed_bytes": collected["freed_bytes"], "before": before, "after": after},
        "summary": summary(seconds_up, tiny, pocket, before, after),
    }  # fmt: skip


def night(made: Installation, profile: str, number: int) -> dict[str, Any]:
    """One night, from being asked for to its end, and what there is afterwards."""
    began = time.monotonic()
    flow_run = made.end(
        made.begin("train-projector/nightly", profile=profile, overrides={"data": {"increment": True}}), seconds=1800
    )  # fmt: skip
    seconds = time.monotonic() - began
    assert flow_run.state is not None
    assert flow_run.state.is_completed(), flow_run.state
    run = made.runs()[-1]
    training = run.data.metrics["train/seconds"]
    time.sleep(3)  # the flow run's process ends after its run
    processes = made.left()
    return {
        "number": number, "seconds": round(seconds, 1), "training_seconds": round(training, 1),
        "overhead_seconds": round(seconds - training, 1), "processes": len(processes),
        "open_files": sum(count(one, "num_fds") for one in processes),
        "memory_bytes": sum(memory(one) for one in processes), "disk": disk(made.home),
    }  # fmt: skip


def count(process: psutil.Process, what: str) -> int:
    try:
        return int(getattr(process, what)())
    except psutil.Error:
        return 0


def memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def disk(home: Path) -> dict[str, int]:
    """Bytes by folder of the home."""
    return {
        one.name: sum(path.lstat().st_size for path in [one, *one.rglob("*")] if path.is_file())
        for one in sorted(home.iterdir())
    }


def summary(
    seconds_up: float, tiny: list[dict[str, Any]], pocket: list[dict[str, Any]], before: dict[str, int],
    after: dict[str, int],
) -> str:  # fmt: skip
    first, last = tiny[1 if len(tiny) > 1 else 0], tiny[-1]
    mb = {name: sum(each.values()) / 1e6 for name, each in (("before", before), ("after", after))}
    growth = (sum(last["disk"].values()) - sum(first["disk"].values())) / max(1, len(tiny) - 2) / 1e6
    told = statistics.median(one["seconds"] for one in tiny)
    grown = "".join(
        f"{name.replace('_', ' ')} {first[name] // unit} -> {last[name] // unit}{tail}, "
        for name, unit, tail in (("processes", 1, ""), ("open_files", 1, ""), ("memory_bytes", 1_000_000, " MB"))
    )
    warm = pocket[-1]
    return (
        f"up after {seconds_up:.0f} s. {len(tiny)} nights of tiny: median {told:.0f} s, {grown}disk {growth:+.1f} MB a "
        f"night. pocket: {warm['seconds']:.0f} s, {warm['training_seconds']:.0f} s of it training, so "
        f"{warm['overhead_seconds']:.0f} s besides. gc: {mb['before']:.0f} -> {mb['after']:.0f} MB."
    )


if __name__ == "__main__":
    main()
