"""``llava-pipeline gc``: what of the home nobody needs any more, and its removal.

Kept is what an alias, a version, one of the newest runs or a job that is under way needs, and whatever was written or
used of late: a job that runs now may have reused it without having told MLflow. All that is removed can be made anew.
MLflow's own files are left alone; those of deleted runs are removed by `mlflow gc`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_pipeline.errors import TrackingError
from llava_pipeline.spec import Frozen
from llava_pipeline.store import ABANDONED_SECONDS, MANIFEST, home
from llava_pipeline.tracking import bundle as bundles
from llava_pipeline.tracking.references import Recorded, recorded, references
from llava_pipeline.tracking.settings import Settings, tracking_uri

DAY = 24 * 60 * 60.0
TRAINING_SECONDS = 7 * DAY  # in which a training that was stopped may be gone on with
LOG_BYTES, KEPT_LOG_BYTES = 20_000_000, 1_000_000
HALF_WRITTEN = (".writing-", ".downloading-", ".fetching-", ".gone-")
NOT_OURS = ("mlartifacts", "prefect", "services", "spool", "datasets", "wheels", "locks")
Needed = dict[tuple[str, str], str]  # kind and digest of an artifact, and who needs it


class Item(Frozen):
    """One thing in the home, and what becomes of it."""

    kind: str
    path: str  # below the home
    num_bytes: int  # on the disk; of a log, what is freed
    deleted: bool
    why: str


def collect(settings: Settings, keep_runs: int, *, dry_run: bool, now: float | None = None) -> list[Item]:
    """Everything that was looked at. Without ``dry_run`` what is told as deleted is gone afterwards.

    What somebody takes in use between the look and the removal stays, and is told as kept.

    Raises:
        TrackingError: MLflow cannot say what is needed; nothing is deleted then.
    """
    at = time.time() if now is None else now
    told = recorded(settings, keep_runs)
    if told is None:
        _refuse_without_records(settings)
        told = Recorded(referrers=(), running_since=None)
    look = Look(told, at)
    items = sorted(look.items(), key=lambda item: (item.kind, item.path))
    return items if dry_run else [_remove(item, look.floor) for item in items]


def _refuse_without_records(settings: Settings) -> None:
    if any((home() / "store").glob("*/*")):
        raise TrackingError(
            f"{tracking_uri(settings)} has no experiment {settings.tracking.experiment!r}, so nothing says what of "
            f"{home() / 'store'} is needed, and nothing is deleted; point MLFLOW_TRACKING_URI or tracking.uri at the "
            "records of this home, or delete the folder by hand"
        )


class Look:
    """One look at a home: what is in it, and what of it is needed."""

    def __init__(self, told: Recorded, now: float) -> None:
        self.home, self.told, self.now = home(), told, now
        self.floor = min(now - DAY, told.running_since or now)
        self.young = "changed in the last 24 hours" if self.floor == now - DAY else "changed since a running job began"
        self.trainings = list(self._trainings())
        self.needed = self._needed()

    def items(self) -> list[Item]:
        """Everything in the home that this looks at."""
        store = list(self._store())
        gone = {item.path for item in store if item.deleted}
        return [
            *store, *self.trainings, *self._results(gone),
            *self._remembered("remembered scores", "scores", "answers", gone),
            *self._remembered("remembered conversions", "gguf", "files", gone),
            *self._unused("tower features", self.home / "features", "no training has used them since"),
            *self._unused("data parts", self.home / "parts", "no validation has read them since"),
            *self._projectors(), *self._bundles(), *self._half_written(), *self._logs(),
        ]  # fmt: skip

    def _needed(self) -> Needed:
        """Who needs an artifact of the store; of several the first one is told."""
        needed: Needed = {}
        roles = ("alias", "newest", "version")
        for referrer in sorted(self.told.referrers, key=lambda one: roles.index(one.role)):
            for need in referrer.needs:
                needed.setdefault((need.kind, need.digest), referrer.who)
        for path in (self.home / "spool").glob("**/*.json"):
            for need in references(_json(path)):
                needed.setdefault((need.kind, need.digest), "a night that waits to be recorded")
        for training in self.trainings:
            if not training.deleted:
                for need in references(_json(self.home / training.path / "job.json")):
                    needed.setdefault((need.kind, need.digest), "a training that can be gone on with")
        return needed

    def _item(self, kind: str, path: Path, kept: str | None, why_not: str) -> Item:
        """Kept for a reason, or because it is young, else deleted."""
        if kept is None and _changed(path) >= self.floor:
            kept = self.young
        relative = path.relative_to(self.home).as_posix()
        return Item(
            kind=kind, path=relative, num_bytes=_size(path), deleted=kept is None, why=why_not if kept is None else kept
        )

    def _store(self) -> Iterator[Item]:
        for path in _folders(self.home / "store"):
            for artifact in _folders(path):
                if not artifact.name.startswith(HALF_WRITTEN):
                    needed_by = self.needed.get((path.name, artifact.name))
                    kept = None if needed_by is None else f"needed by {needed_by}"
                    yield self._item(f"store: {path.name}", artifact, kept, "nothing that is kept refers to it")

    def _trainings(self) -> Iterator[Item]:
        for path in _folders(self.home / "training"):
            with _training_at_rest(path) as at_rest:
                newest, finished = _newest(path), any((path / "result").glob("[0-9]*"))
            kept = None
            if not at_rest:
                kept = "it is running"
            elif newest >= self.floor:
                kept = self.young
            elif not finished and newest > self.now - TRAINING_SECONDS:
                kept = "stopped less than 7 days ago, so it can be gone on with"
            why_not = "finished" if finished else "stopped more than 7 days ago"
            yield self._item("training", path, kept, why_not)

    def _remembered(self, kind: str, folder: str, what: str, gone: set[str]) -> Iterator[Item]:
        for path in _files(self.home / "cache" / folder):
            lines = [f"store/{ref.kind}/{ref.digest}" for ref in references(_json(path))]
            there = bool(lines) and all(line not in gone and (self.home / line).is_dir() for line in lines)
            kept = f"its {what} are in the store" if there else None
            yield self._item(kind, path, kept, f"its {what} are not in the store any more")

    def _results(self, gone: set[str]) -> Iterator[Item]:
        """Prefect's results; one whose artifacts are lost would be made anew anyway."""
        for path in _files(self.home / "prefect" / "storage"):
            record = _json(path)
            text = record.get("result") if isinstance(record, dict) else None
            refs = [f"store/{ref.kind}/{ref.digest}" for ref in references(_parsed(text))]
            lost = any(ref in gone or not (self.home / ref).is_dir() for ref in refs)
            kept = None if lost else "its artifacts are in the store" if refs else "it refers to nothing in the store"
            yield self._item("Prefect results", path, kept, "its artifacts are not in the store any more")

    def _unused(self, kind: str, root: Path, why_not: str) -> Iterator[Item]:
        for path in _folders(root):
            yield self._item(kind, path, None, why_not)

    def _projectors(self) -> Iterator[Item]:
        who = {one.run_id: one.who for one in self.told.referrers if one.role != "version"}
        for path in _folders(self.home / "cache" / "projectors"):
            if not path.name.startswith(HALF_WRITTEN):
                kept = f"needed by {who[path.name]}" if path.name in who else None
                yield self._item("downloaded projectors", path, kept, "no alias and none of the newest runs has it")

    def _bundles(self) -> Iterator[Item]:
        for root in _folders(self.home / "serving"):
            kept = {
                bundle.folder: path.stem
                for path in root.glob("*.json")
                if (bundle := bundles.kept(root.name, path.stem)) is not None
            }
            for path in _folders(root):
                if not path.name.startswith("."):
                    by = f"answers as {kept[path]}" if path in kept else None
                    yield self._item("bundles of serving", path, by, "it answers under no alias")

    def _half_written(self) -> Iterator[Item]:
        """Temporary folders and files of writers that were killed, wherever in the home they stand."""
        for folder, folders, files in os.walk(self.home):
            for name in [*folders, *files]:
                if name.startswith(HALF_WRITTEN):
                    path = Path(folder) / name
                    abandoned = _newest(path) < self.now - ABANDONED_SECONDS
                    kept = None if abandoned else "its writer may be at work"
                    yield self._item("half written", path, kept, "its writer was killed")
            inside = Path(folder) == self.home
            folders[:] = [n for n in folders if not n.startswith(HALF_WRITTEN) and not (inside and n in NOT_OURS)]

    def _logs(self) -> Iterator[Item]:
        for path in _files(self.home / "services"):
            if path.suffix in (".log", ".old"):
                is_large = _size(path) > LOG_BYTES
                yield Item(
                    kind="logs of services", path=path.relative_to(self.home).as_posix(), deleted=is_large,
                    num_bytes=_size(path) - (KEPT_LOG_BYTES if is_large else 0),
                    why=f"all but the last {KEPT_LOG_BYTES // 1_000_000} MB" if is_large else "it is small",
                )  # fmt: skip


def _remove(item: Item, floor: float) -> Item:
    """Remove what is to be deleted, unless somebody has taken it in use since; tells what became of it."""
    if not item.deleted:
        return item
    path = home() / item.path
    removers: dict[str, Callable[[Path], str | None]] = {
        "training": _remove_training, "bundles of serving": _remove_bundle, "logs of services": _shorten,
    }  # fmt: skip
    kept: str | None = None
    try:
        if (remover := removers.get(item.kind)) is not None:
            kept = remover(path)
        elif _changed(path) >= floor:
            kept = "taken in use meanwhile"
        else:
            _discard(path)
    except OSError as error:  # of another user, or on a disk that can only be read; the rest is removed all the same
        kept = f"cannot be removed ({error.strerror})"
    return item if kept is None else item.model_copy(update={"deleted": False, "why": kept})


def _discard(path: Path) -> None:
    """Under another name first, so that what is left when this is killed is not taken for something whole."""
    with (
        contextlib.suppress(FileNotFoundError),  # somebody else was faster
        tempfile.TemporaryDirectory(prefix=".gone-", dir=path.parent, ignore_cleanup_errors=True) as gone,
    ):
        path.replace(Path(gone) / path.name)


def _remove_training(path: Path) -> str | None:
    with _training_at_rest(path) as at_rest:
        if not at_rest:
            return "it is running"
        _discard(path)
    return None


def _remove_bundle(path: Path) -> str | None:
    """By serving's own rule and lock: whoever loads a version is not disturbed."""
    if path.is_dir() and not bundles.sweep(path.parent.name):
        return "a server is loading a version"
    return "a server has taken it in use" if path.is_dir() else None


def _shorten(path: Path) -> str | None:
    """Keep the end of a log, in place: its writer appends to this very file."""
    with path.open("rb+") as file:
        file.seek(-KEPT_LOG_BYTES, os.SEEK_END)
        end = file.read()
        file.truncate(0)
        file.seek(0)
        file.write(end[end.find(b"\n") + 1 :])
    return None


@contextmanager
def _training_at_rest(path: Path) -> Iterator[bool]:
    """Whether no process trains in a folder; if so, none can begin to before this ends."""
    try:
        lock = (path / "lock").open("rb")
    except OSError:  # nobody has ever trained there
        yield True
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _changed(path: Path) -> float:
    """When something was written or used: its own time of change, or that of its manifest."""
    times = [_time(path), _time(path / MANIFEST)] if path.is_dir() else [_time(path)]
    return max(times)


def _newest(path: Path) -> float:
    """When anything in it was changed."""
    return max(_time(one) for one in (path, *path.rglob("*")))


def _time(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    """Bytes on the disk, of a folder with all that is in it."""
    total = 0
    for one in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            found = one.lstat()
            total += 0 if one.is_dir() else min(found.st_size, found.st_blocks * 512)
    return total


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink()) if root.is_dir() else []


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_file()) if root.is_dir() else []


def _json(path: Path) -> Any:
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
