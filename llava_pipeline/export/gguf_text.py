"""The language model as a GGUF that llama.cpp runs: Llama, Mistral, Qwen 2 and Qwen 3, in f16 or q8_0."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from llava_pipeline.errors import ExportRefused
from llava_pipeline.export.huggingface import head_dim
from llava_pipeline.export.vocabulary import write_vocabulary
from llava_pipeline.model.assemble import Llava

Quantize = Literal["f16", "q8_0"]
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
INTERLEAVED = ("llama", "mistral")
BLOCK = 32  # weights that q8_0 scales together
_FILE_TYPES = {"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}


def write_text(path: Path, llava: Llava, name: str, licence: str, quantize: Quantize) -> None:
    """Write configuration, tokenizer, chat template and weights.

    Raises:
        ExportRefused: llama.cpp has no such language model or tokenizer, or this export does not write it.
    """
    text = llava.model.config.text_config
    architecture = architecture_of(text)
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_license(licence)
    writer.add_file_type(_FILE_TYPES[quantize])
    _write_sizes(writer, text)
    write_vocabulary(writer, llava)
    names = gguf.get_tensor_name_map(architecture, text.num_hidden_layers)
    for key, weight in _weights(llava):
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportRefused(f"the language model has {key}, which llama.cpp's {text.model_type} lacks; use --to hf")
        add_weight(writer, found, weight, quantize)
    for key, value in _rope(text):
        writer.add_tensor(key, value)
    finish(writer)


def architecture_of(text: Any) -> Any:
    """llama.cpp's name of a language model's architecture.

    Raises:
        ExportRefused: none that is written here.
    """
    found = ARCHITECTURES.get(text.model_type)
    if found is None:
        raise ExportRefused(
            f"the language model is a {text.model_type}; a GGUF is written of {', '.join(ARCHITECTURES)}; use --to hf"
        )
    if getattr(text, "hidden_act", "silu") != "silu":
        raise ExportRefused(f"the language model has {text.hidden_act} where llama.cpp has silu; use --to hf")
    window = getattr(text, "sliding_window", None) is not None and text.model_type == "mistral"
    if window or getattr(text, "use_sliding_window", False):
        raise ExportRefused("the language model attends to a sliding window, which is not written; use --to hf")
    return found


def add_weight(writer: GGUFWriter, name: str, weight: Tensor, quantize: Quantize = "f16") -> None:
    """A vector in float32, a matrix in 16 bits, or in 8 where its rows are whole blocks."""
    values = weight.detach().float().cpu().numpy()
    if values.ndim == 1:
        writer.add_tensor(name, np.ascontiguousarray(values))
    elif quantize == "q8_0" and values.ndim == 2 and values.shape[-1] % BLOCK == 0:
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        if not np.isfinite(half := values.astype(np.float16)).all():
            raise ExportRefused(f"{name} has numbers beyond the range of 16 bits; use --to hf")
        writer.add_tensor(name, half)


def finish(writer: GGUFWriter) -> None:
    """Write all that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: GGUFWriter, text: Any) -> None:
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head_dim(text))
    writer.add_value_length(head_dim(text))
    writer.add_rope_dimension_count(head_dim(text))
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(float(text.rope_parameters["rope_theta"]))


def _weights(llava: Llava) -> Iterator[tuple[str, Tensor]]:
    """The language model's weights by transformers' names, as llama.cpp wants their rows."""
    text = llava.model.config.text_config
    for name, weight in llava.model.model.language_model.named_parameters():
        if text.model_type in INTERLEAVED and ".q_proj." in name:
            weight = interleave(weight, text.num_attention_heads)
        elif text.model_type in INTERLEAVED and ".k_proj." in name:
            weight = interleave(weight, text.num_key_value_heads)
        yield f"model.{name}", weight
    if not llava.model.config.tie_word_embeddings:
        yield "lm_head.weight", llava.model.lm_head.weight


def interleave(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of each head in the order of llama.cpp's Llama, which turns neighbours where transformers turns halves."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _rope(text: Any) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """By how much each frequency is divided, where the model was stretched as Llama 3 is.

    Raises:
        ExportRefused: it was stretched in another way.
    """
    rope = text.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return
    if kind != "llama3":
        raise ExportRefused(
            f"the language model's positions are stretched by {kind}, which is not written; use --to hf"
        )
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    width, before = head_dim(text), rope["original_max_position_embeddings"]
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    turns = before * frequency / (2 * math.pi)  # over the context that it was first trained with
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    yield "rope_freqs.weight", (1 / ((1 - smooth) / factor + smooth)).numpy()
