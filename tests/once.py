"""What takes long to make is made once for all processes of a test run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(name: str, make: Callable[[Path], None], factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that ``make`` has filled, in this process or in another one; nothing may change it."""
    base = factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").is_file():
            make(folder)
            (folder / "done").touch()
    return folder
