"""How a part lies on disk: one flat folder, as the hub lays it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from llava_pipeline.errors import NotFound, WeightsMismatch

logger = logging.getLogger(__name__)

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # and any .gguf


def choose_weights(names: Iterable[str], named: str | None, where: str) -> str:
    """The named weight file, or the only other one there is.

    Raises:
        NotFound: there is none, or more than one to choose from, or no config.json beside it.
    """
    known = set(names)
    if named is not None and named in known:
        chosen = named
    else:
        others = sorted(name for name in known if name in WEIGHT_FILES or name.endswith(".gguf"))
        if len(others) != 1:
            raise NotFound(
                f"{where} has no {named or 'single weight file'}, and of other weight files {len(others)} "
                f"({', '.join(others) or 'none'}); name the one to take as `weights` of the part in the spec"
            )
        chosen = others[0]
        if named is not None:
            logger.warning("%s has no %s; its only weight file %s is taken", where, named, chosen)
    if not chosen.endswith(".gguf") and "config.json" not in known:
        raise NotFound(f"{where} has {chosen} but no config.json; put the model's config.json beside it")
    return chosen


INDEX = ".index.json"


def shards_of(weights: Path) -> list[str]:
    """Names of the files that an index of weights names, as large models come in several; none of any other file.

    Raises:
        WeightsMismatch: it is no such index, or names a file elsewhere.
    """
    if not weights.name.endswith(INDEX):
        return []
    try:
        names = sorted(set(json.loads(weights.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsMismatch(f"{weights.name} is no index of weight files ({error}); fetch it anew") from error
    if odd := [name for name in names if Path(name).name != name or not name.endswith((".safetensors", ".bin"))]:
        raise WeightsMismatch(f"{weights.name} names {odd[0]!r}, which is no weight file beside it; fetch it anew")
    return names


def kept(names: Iterable[str], weights: str) -> list[str]:
    """Those files that belong to a part, in order."""
    return sorted(set(names) & {*SIDE_FILES, weights})
