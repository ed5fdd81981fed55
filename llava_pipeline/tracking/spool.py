"""What a night has brought and MLflow does not have yet: ``<home>/spool/<flow run>.json``, shipped when MLflow is back.

An entry is written before the recording and removed when the gate has decided, so that a night is finished by whoever
comes next, wherever it was cut off. What it names lies in the store.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

from pydantic import ValidationError

from llava_pipeline.contracts import AssembledModel, Evaluation
from llava_pipeline.errors import LlavaPipelineError
from llava_pipeline.spec import Frozen, RunSpec
from llava_pipeline.store import home, write_text
from llava_pipeline.tracking.reading import LastRead, reading_id
from llava_pipeline.tracking.stale import is_elsewhere, is_gone, this_process

_log = logging.getLogger(__name__)
REFUSED = "refused"
ABANDONED_SECONDS = 24 * 60 * 60.0  # a job of another machine or container does not tell when it has ended


class Spooled(Frozen):
    """One night's results."""

    spec: RunSpec
    evaluation: Evaluation
    tags: dict[str, str]  # of its run in MLflow
    began: float  # seconds since the epoch
    process: str  # that is at it

    @property
    def path(self) -> Path:
        """Where it waits."""
        return _entry(self.tags)


def keep(spec: RunSpec, evaluation: Evaluation, tags: dict[str, str], began: float) -> Spooled:
    """Write down what is about to be recorded.

    Raises:
        DiskFull: no space left for it.
    """
    entry = Spooled(spec=spec, evaluation=evaluation, tags=tags, began=began, process=this_process())
    write_text(entry.path, entry.model_dump_json())
    return entry


def forget(tags: dict[str, str]) -> None:
    """The gate has decided on what this flow run has brought."""
    _entry(tags).unlink(missing_ok=True)


def waiting() -> list[Spooled]:
    """What nobody is at any more, the oldest first. An entry that cannot be read is told and left."""
    found = []
    for path in sorted((home() / "spool").glob("*.json")):
        try:
            entry = Spooled.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            _log.warning("%s cannot be read (%s); it is left there", path, type(error).__name__)
            continue
        if is_gone(entry.process) or (is_elsewhere(entry.process) and _age(path) > ABANDONED_SECONDS):
            found.append(entry)
    return sorted(found, key=lambda entry: entry.began)


def refuse(entry: Spooled, reason: str) -> Path:
    """Put an entry aside that MLflow does not take, so that it is not tried every hour; gives its new place."""
    aside = home() / "spool" / REFUSED / entry.path.name
    write_text(aside, entry.path.read_text(encoding="utf-8"))
    write_text(aside.with_suffix(".txt"), reason + "\n")
    entry.path.unlink()
    return aside


def last_read(model: AssembledModel, origin: str) -> LastRead | None:
    """How far the newest waiting night of this model on this source has read; None where none waits.

    Never raises: what cannot be read has been told.
    """
    asked = reading_id(model, origin)
    try:
        entries = [
            entry for entry in waiting()
            if reading_id(entry.evaluation.projector.model, entry.evaluation.projector.data.origin) == asked
        ]  # fmt: skip
    except LlavaPipelineError:
        return None
    return LastRead(entries[-1].evaluation.projector.data.ended, entries[-1].began) if entries else None


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _entry(tags: dict[str, str]) -> Path:
    name = tags.get("prefect.flow_run_id") or hashlib.sha256(repr(sorted(tags.items())).encode()).hexdigest()[:32]
    return home() / "spool" / f"{name}.json"
