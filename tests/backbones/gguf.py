"""A tiny language model in a GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFWriter, TokenType
from transformers.convert_slow_tokenizer import bytes_to_unicode


def write_tiny_gguf(path: Path) -> None:
    """A Llama in float32, with the bytes and three special tokens as vocabulary."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *bytes_to_unicode().values(), "he"]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "token_embd.weight": (len(tokens), 8),
        "output_norm.weight": (8,),
        **{f"blk.0.{name}_norm.weight": (8,) for name in ("attn", "ffn")},
        **{f"blk.0.attn_{name}.weight": shape for name, shape in (("q", (8, 8)), ("k", (4, 8)), ("v", (4, 8)))},
        "blk.0.attn_output.weight": (8, 8),
        **{f"blk.0.ffn_{name}.weight": (16, 8) for name in ("gate", "up")},
        "blk.0.ffn_down.weight": (8, 16),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
