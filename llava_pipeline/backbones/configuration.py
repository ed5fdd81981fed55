"""Configuration and tokenizer of a part, from its folder alone: no hub is asked, no code that lies there is run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_pipeline.errors import IncompatibleParts, LlavaPipelineError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # all that they are is in tokenizer.json
LONGEST_REASON = 200


def read_config(folder: Path, weights: str, origin: str) -> PreTrainedConfig:
    """A model's configuration; a GGUF file holds its own.

    Raises:
        IncompatibleParts: there is none, or transformers cannot use it.
    """
    from transformers import AutoConfig

    with usable(origin, weights if weights.endswith(".gguf") else "config.json", folder):
        return AutoConfig.from_pretrained(folder, **_options(weights))


def read_tokenizer(folder: Path, weights: str, origin: str) -> PreTrainedTokenizerFast:
    """A language model's tokenizer; a GGUF file holds its own.

    Raises:
        IncompatibleParts: there is none, or transformers cannot use it.
    """
    with usable(origin, weights if weights.endswith(".gguf") else "tokenizer.json", folder):
        if not weights.endswith(".gguf") and _tokenizer_class(folder) in PLAIN_TOKENIZERS:
            from transformers import PreTrainedTokenizerFast

            # What AutoTokenizer would give, without the five seconds and 200 MB of torch that asking it costs.
            return PreTrainedTokenizerFast.from_pretrained(folder, **LOCAL)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, **_options(weights))


def _tokenizer_class(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    return str(json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")) if path.exists() else ""


def _options(weights: str) -> dict[str, Any]:
    return LOCAL | ({"gguf_file": weights} if weights.endswith(".gguf") else {})


@contextmanager
def usable(origin: str, what: str, folder: Path | None = None) -> Iterator[None]:
    """Whatever breaks while a part's file is read or used is told as that file's fault, without ``folder``'s path.

    Raises:
        IncompatibleParts: the block raised.
    """
    try:
        yield
    except LlavaPipelineError:
        raise
    except Exception as error:  # of json, huggingface_hub, transformers or tokenizers, and no two share a base
        raise IncompatibleParts(
            f"{origin} has no {what} that can be used ({_reason(error, folder)}); "
            f"put the model's {what} beside its weights, or choose another part"
        ) from error


def _reason(error: Exception, folder: Path | None) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "it asks to run code of its own, which is never done"
    if folder is not None:
        text = text.replace(f"{folder}/", "").replace(str(folder), "it")
    words = " ".join(text.split())[:LONGEST_REASON]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
