"""Which process it is: a number alone is given again, and a time of day moves when somebody sets the clock."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import psutil

START_FIELD = 19  # of /proc/<pid>/stat behind the name: ticks from the start of the machine to that of the process


def began(pid: int) -> str:
    """When a process began, in a form that no other process of this number has, before or after.

    On Linux: ticks since the machine started, and which start of the machine that was. Elsewhere: the time of day.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            raise ProcessLookupError(pid) from None
    else:
        return f"{stat.rpartition(')')[2].split()[START_FIELD]}@{_boot()}"
    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.NoSuchProcess:
        raise ProcessLookupError(pid) from None


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8]
    except OSError:
        return ""
