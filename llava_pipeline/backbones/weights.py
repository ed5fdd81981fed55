"""Weights as they lie on disk: safetensors, pickled ``.bin`` (read without running code) and GGUF."""

from __future__ import annotations

import logging
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_pipeline.backbones.configuration import LOCAL
from llava_pipeline.backbones.layout import shards_of
from llava_pipeline.errors import SpecError, WeightsMismatch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".bin", ".gguf")


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` or ``.bin`` file by name, on the CPU, in the precision they are stored in; of
    an ``.index.json``, those of all the files that it names.

    Raises:
        SpecError: another suffix; a ``.gguf`` file is read by ``read_gguf``.
        WeightsMismatch: the file is missing, truncated or damaged, or holds anything but named tensors.
    """
    if shards := shards_of(path):
        return {name: tensor for shard in shards for name, tensor in read_state_dict(path.with_name(shard)).items()}
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".bin":
        return _read_pickle(path)
    raise SpecError(f"cannot read weights from {path.name!r}; name a file that ends in {', '.join(SUFFIXES)}")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        # Files written before torch 1.6 are no zip archives and cannot be mapped into memory.
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(loaded, dict):
        raise WeightsMismatch(f"{path.name} holds a {type(loaded).__name__}, not tensors by name; name another file")
    odd = [str(key) for key, value in loaded.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if odd or not loaded:
        raise WeightsMismatch(
            f"{path.name} holds other things than named tensors ({', '.join(odd[:5]) or 'nothing at all'}); "
            "name a file that holds weights alone"
        )
    return loaded


def read_gguf(folder: Path, weights: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, dict[str, torch.Tensor]]:
    """Configuration, tokenizer and dequantized float32 tensors of a GGUF file, in transformers' names.

    With tied embeddings there is no ``lm_head.weight``, as in a safetensors file of such a model.

    Raises:
        WeightsMismatch: the file is missing, truncated or damaged, or of an architecture transformers cannot read.
    """
    import struct

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # from_pretrained(gguf_file=...) calls this too, but asks for accelerate first and fills random weights before.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = folder / weights
    if not path.is_file():
        raise WeightsMismatch(f"there is no {weights} to read; fetch the backbones again with --refresh")
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=weights, **LOCAL)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights, **LOCAL)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        parsed = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model, torch_dtype=torch.float32)
    except (OSError, ValueError, IndexError, KeyError, TypeError, NotImplementedError, struct.error) as error:
        raise _unreadable(path, error) from error
    tensors: dict[str, torch.Tensor] = parsed["tensors"]
    return config, tokenizer, tensors


def _unreadable(path: Path, error: Exception) -> WeightsMismatch:
    size = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return WeightsMismatch(
        f"cannot read weights from {path.name} ({size}): {reason}; it is truncated, damaged or of another format: "
        "fetch it again with --refresh, or name another weight file"
    )
