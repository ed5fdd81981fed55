"""Time, memory and scores of whole runs, each in an empty home of its own.

    python -m benchmarks                     # pocket, easy-vqa, smol
    python -m benchmarks --profile pocket    # one of them

Writes ``benchmarks/results/<profile>.json`` with the machine, the command and the raw numbers. The clock starts before
the process and stops after it, Prefect's and MLflow's start included; memory is the sum over all its processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
PROFILES = ("pocket", "easy-vqa", "smol")
COMMAND = [str(Path(sys.executable).with_name("llava-pipeline"))]


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in info]
    return {
        "cpu": model, "flags": flags, "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(), "load_before": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "prefect", "mlflow")},
    }  # fmt: skip


class PeakMemory(threading.Thread):
    """Samples the memory of a process and all its children, as proportional set size, five times a second."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.root, self.peak, self.running = psutil.Process(pid), 0, True

    def run(self) -> None:
        while self.running:
            total = 0
            try:
                for process in (self.root, *self.root.children(recursive=True)):
                    total += process.memory_full_info().pss
            except psutil.Error:
                pass
            self.peak = max(self.peak, total)
            time.sleep(0.2)


def measure(arguments: list[str], home: Path) -> tuple[float, int, str]:
    """Seconds, peak bytes and the last line of stdout of one command."""
    environment = os.environ | {"LLAVA_PIPELINE_HOME": str(home)}
    started = time.monotonic()
    process = subprocess.Popen([*COMMAND, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
    memory = PeakMemory(process.pid)
    memory.start()
    out, _ = process.communicate()
    memory.running = False
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return time.monotonic() - started, memory.peak, out.strip().splitlines()[-1]


def bench(profile: str) -> dict[str, Any]:
    """One profile: a first run, and a second one that reuses what it can."""
    before = machine()
    with tempfile.TemporaryDirectory() as home:
        arguments = ["run", "--profile", profile, "--json"]
        seconds, peak, line = measure(arguments, Path(home))
        again, _, _ = measure(arguments, Path(home))
    row = json.loads(line)
    return {
        "command": " ".join(["llava-pipeline", *arguments]),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": before, "seconds": round(seconds, 1), "seconds_second_run": round(again, 1),
        "peak_memory_gb": round(peak / 1e9, 2), "decision": row["verdict"]["decision"],
        "metrics": {key: round(value, 4) for key, value in row["metrics"].items() if value is not None},
    }  # fmt: skip


def help_seconds(repeats: int = 5) -> float:
    """Median seconds of ``llava-pipeline --help``."""
    times = []
    for _ in range(repeats):
        started = time.monotonic()
        subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)
        times.append(time.monotonic() - started)
    return sorted(times)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="append", choices=PROFILES)
    chosen = parser.parse_args().profile or PROFILES
    for profile in chosen:
        result = bench(profile) | {"help_seconds": round(help_seconds(), 2)}
        path = RESULTS / f"{profile}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{path}: {result['seconds']} s, {result['peak_memory_gb']} GB, "
              f"exact match {result['metrics']['eval/exact_match']}")  # fmt: skip


if __name__ == "__main__":
    main()
