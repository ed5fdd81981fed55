"""A GGUF as plain files, made the first time that it is read: transformers takes half a minute for SmolLM2's, always.

Large ones stay as they are: in float32 they would take eight times their space.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from llava_pipeline import store
from llava_pipeline.backbones.layout import WEIGHT_FILES
from llava_pipeline.contracts import ArtifactRef, FetchedBackbone
from llava_pipeline.errors import DamagedArtifact, MissingArtifact

logger = logging.getLogger(__name__)
LARGEST_BYTES = 500_000_000


def plain(part: FetchedBackbone) -> tuple[Path, str]:
    """Folder and weight file that a part is read from: its own, or what its GGUF was converted to.

    Raises:
        WeightsMismatch: a GGUF that cannot be read.
        DiskFull: no space left for it.
    """
    folder = store.open_artifact(part.files)
    if not part.weights.endswith(".gguf") or part.files.num_bytes > LARGEST_BYTES:
        return folder, part.weights
    told = _remembered(part)
    with contextlib.suppress(OSError, ValidationError, MissingArtifact, DamagedArtifact):
        return store.open_artifact(ArtifactRef.model_validate_json(told.read_text(encoding="utf-8"))), WEIGHT_FILES[0]
    logger.info("converting %s once ...", part.weights)
    with store.writing("backbone") as (new, done):
        _convert(folder, part.weights, new)
    told.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(told, done[0].model_dump_json())
    return store.open_artifact(done[0]), WEIGHT_FILES[0]


def _remembered(part: FetchedBackbone) -> Path:
    """Where it is written down what a GGUF was converted to, by these versions of who reads it."""
    read_by = (part.files.digest, part.weights, version("transformers"), version("gguf"))
    return store.home() / "cache" / "gguf" / f"{hashlib.sha256(repr(read_by).encode()).hexdigest()[:32]}.json"


def _convert(folder: Path, weights: str, new: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from llava_pipeline.backbones.weights import read_gguf

    config, tokenizer, tensors = read_gguf(folder, weights)
    config.save_pretrained(new)
    tokenizer.save_pretrained(new)
    try:
        save_file(tensors, new / WEIGHT_FILES[0], metadata={"format": "pt"})
    except SafetensorError as error:  # its writer tells a full disk as no OSError
        raise OSError(errno.ENOSPC if f"os error {errno.ENOSPC}" in str(error) else errno.EIO, str(error)) from error
