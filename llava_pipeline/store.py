"""Content-addressed stage outputs on disk: ``<home>/store/<kind>/<digest>/``.

A folder is written under a temporary name; its manifest (size and sha256 of every file) is written last and the
folder is moved into place in one step, so a folder with its final name is complete. Opening checks it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_pipeline.contracts import ArtifactRef
from llava_pipeline.errors import DamagedArtifact, DiskFull, MissingArtifact

MANIFEST = "MANIFEST.json"
ABANDONED_SECONDS = 24 * 60 * 60.0  # after so long without a change, a temporary folder's writer was killed
_verified: set[Path] = set()


def home() -> Path:
    """Where everything the pipeline writes lives: ``$LLAVA_PIPELINE_HOME``, else ``.llava-pipeline`` here."""
    return Path(os.environ.get("LLAVA_PIPELINE_HOME") or ".llava-pipeline").absolute()


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and digest of every file below a folder but the manifest, by relative name."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }


def digest_of(files: dict[str, dict[str, int | str]]) -> str:
    """Digest of an artifact: of its canonical manifest."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


@contextmanager
def writing(kind: str) -> Iterator[tuple[Path, list[ArtifactRef]]]:
    """A fresh folder to fill, and a list that holds the finished artifact's reference after the block.

    Nothing is left behind when the block raises.

    Raises:
        DiskFull: no space left on the device.
    """
    root = home() / "store" / kind
    try:
        root.mkdir(parents=True, exist_ok=True)
        sweep(root, ".writing-*")
        folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=root))
    except OSError as error:
        tell_disk_full(error, root)
        raise
    done: list[ArtifactRef] = []
    try:
        yield folder, done
        done.append(_commit(kind, folder))
    except OSError as error:
        tell_disk_full(error, root)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Put a text into a file in one step: a reader sees the old file or the whole new one.

    Raises:
        DiskFull: no space left for it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
            new = Path(folder) / path.name
            new.write_text(text, encoding="utf-8")
            new.replace(path)
    except OSError as error:
        tell_disk_full(error, path.parent)
        raise


def tell_disk_full(error: OSError, folder: Path, variable: str = "LLAVA_PIPELINE_HOME") -> None:
    """Raise DiskFull for an error that means it; ``variable`` says where else ``folder`` could be.

    Raises:
        DiskFull: no space left, a quota or a limit of file sizes is reached.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise DiskFull(f"no space left below {folder}; free some, or point {variable} at a larger disk") from error


def sweep(root: Path, pattern: str) -> None:
    """Remove temporary folders that killed processes left below ``root``.

    By age, not by process: another container may write into the same store under the same process number.
    """
    for folder in root.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # its writer has just finished
            newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
            if time.time() - newest > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _commit(kind: str, folder: Path) -> ArtifactRef:
    files = describe(folder)
    digest = digest_of(files)
    final = folder.parent / digest
    for name in files:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    manifest = folder / MANIFEST
    with manifest.open("w", encoding="utf-8") as file:
        json.dump(files, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    if final.exists() and _damage(final, digest):
        shutil.rmtree(final)
    try:
        os.replace(folder, final)
    except OSError as error:  # the same content is there already, put by an earlier run or one beside this one
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _verified.add(final)
    return ArtifactRef(kind=kind, digest=digest, num_bytes=sum(int(f["bytes"]) for f in files.values()))


def _damage(folder: Path, digest: str) -> str | None:
    """What is wrong with an artifact's folder, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "its manifest is missing or unreadable"
    if digest_of(manifest) != digest:
        return "its manifest was changed"
    found = describe(folder)
    for name, expected in manifest.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != expected:
            return f"{name} was changed"
    return None


def open_artifact(ref: ArtifactRef) -> Path:
    """The folder of an artifact, checked against its manifest once per process.

    Raises:
        MissingArtifact: it is not in the store.
        DamagedArtifact: a file is missing or differs.
    """
    folder = home() / "store" / ref.kind / ref.digest
    if not folder.is_dir():
        raise MissingArtifact(
            f"{ref.kind} {ref.digest[:12]} is not in the store at {home() / 'store'}; "
            "run again with --refresh to make it anew"
        )
    if folder not in _verified:
        if problem := _damage(folder, ref.digest):
            raise DamagedArtifact(
                f"{ref.kind} {ref.digest[:12]} is damaged: {problem}; delete {folder} and run again with --refresh"
            )
        _verified.add(folder)
        with contextlib.suppress(OSError):  # a store that may only be read
            os.utime(folder)  # in use now: whoever clears up goes by age
    return folder
