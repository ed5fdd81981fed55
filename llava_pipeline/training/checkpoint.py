"""Checkpoints that a kill at any moment leaves whole: ``<folder>/<step>/`` with tensors, state and manifest.

Written under a temporary name, the manifest (size and sha256 of every file) last, everything flushed to the disk, then
moved into place in one step. The newest two are kept, and what is damaged is told and passed over.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llava_pipeline.store import MANIFEST, describe, tell_disk_full
from llava_pipeline.training.stored import write_tensors

log = logging.getLogger(__name__)
TENSORS, STATE = "state.safetensors", "state.json"
NUM_KEPT = 2
State = tuple[dict[str, Tensor], dict[str, Any]]


def write(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any],
    whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Path:  # fmt: skip
    """Write the checkpoint of a step, and remove all but the newest two. Each tensor is made ``whole``, on the host,
    when it is its turn.

    Raises:
        DiskFull: no space left; the earlier checkpoints are untouched.
    """
    final, temporary = folder / f"{step:09d}", folder / f".writing-{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # Written by Python, for safetensors' own writer tells a full disk as no OSError.
        _put(temporary / TENSORS, lambda file: write_tensors(file, tensors, whole))
        _put(temporary / STATE, json.dumps(state, indent=1).encode())
        _put(temporary / MANIFEST, json.dumps(describe(temporary), indent=1).encode())
        _flush(temporary)
        if final.exists():  # damaged and passed over, or of this very step
            shutil.rmtree(final)
        temporary.replace(final)
        _flush(folder)
    except OSError as error:
        tell_disk_full(error, folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    written = _all(folder)
    later = [path for path in written if path.name > final.name]  # all damaged, or this step would not be taken again
    for path in later + written[len(later) + NUM_KEPT :]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def newest(folder: Path, fits: Callable[[dict[str, Any]], bool] = lambda state: True) -> State | None:
    """The newest checkpoint that is whole and whose state ``fits`` what lies beside it, or None."""
    for path in _all(folder):
        found = read(path)
        if found is not None and fits(found[1]):
            return found
    return None


def read(path: Path) -> State | None:
    """A checkpoint's tensors and state; None, and told, where a file is missing or not as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest != describe(path):
            raise ValueError("its files are not those of its manifest")
        return load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        log.warning("checkpoint %s is damaged (%s); the one before it is used", path.name, error)
        return None


def _all(folder: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    return sorted((path for path in folder.glob("[0-9]*") if path.is_dir()), reverse=True)


def _put(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    with path.open("wb") as file:
        content(file) if callable(content) else file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written."""
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)
