"""What `llava-pipeline doctor` finds: one thing that is well, or not quite, or not at all."""

from __future__ import annotations

from typing import Literal

from llava_pipeline.spec import Frozen

Status = Literal["ok", "warning", "problem"]


class Finding(Frozen):
    """One thing that was looked at."""

    name: str
    status: Status
    found: str
    remedy: str = ""  # empty where nothing is to be done


def well(name: str, found: str) -> Finding:
    """Nothing is to be done."""
    return Finding(name=name, status="ok", found=found)


def warning(name: str, found: str, remedy: str) -> Finding:
    """A night would work, or nobody needs this."""
    return Finding(name=name, status="warning", found=found, remedy=remedy)


def problem(name: str, found: str, remedy: str) -> Finding:
    """A night would fail, or somebody could do harm."""
    return Finding(name=name, status="problem", found=found, remedy=remedy)
