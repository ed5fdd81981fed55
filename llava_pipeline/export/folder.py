"""The folder of an export: whole under its name or not there, with the sha256 of every file in it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_pipeline.errors import ExportRefused
from llava_pipeline.store import MANIFEST, describe, tell_disk_full

UNVERIFIED = ".unverified"


def refuse_if_taken(folder: Path) -> None:
    """Refuse a place where something lies.

    Raises:
        ExportRefused: it is a file, or a folder that is not empty.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise ExportRefused(f"{folder} exists already; name a new folder, or remove that one first")


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill in the place of ``folder``, to be moved by ``finish``; removed if it still lies there.

    Raises:
        ExportRefused: ``folder`` is taken, or cannot be written.
        DiskFull: no space left for it.
    """
    refuse_if_taken(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.writing-", dir=folder.parent))
    except OSError as error:
        tell_disk_full(error, folder.parent, "DIR")
        raise ExportRefused(f"cannot write below {folder.parent} ({error.strerror}); name another folder") from error
    try:
        yield temporary
    except OSError as error:
        tell_disk_full(error, folder.parent, "DIR")
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finish(temporary: Path, folder: Path) -> Path:
    """Write the manifest, the last of the files, and move the whole to its name, if nothing has come there since."""
    refuse_if_taken(folder)
    temporary.chmod(0o777 & ~_umask())
    files = describe(temporary)
    write_json(temporary / MANIFEST, files)
    for name in (*files, MANIFEST):
        with (temporary / name).open("rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, folder)
    return folder


def put_aside(temporary: Path, folder: Path) -> Path:
    """Keep what other engines do not answer alike beside its place, in place of an earlier one; gives where."""
    aside = folder.with_name(folder.name + UNVERIFIED)
    if aside.is_dir():
        shutil.rmtree(aside)
    return finish(temporary, aside)


def write_json(path: Path, content: Any) -> None:
    """As people read it."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
