"""Tokenizers of four kinds: llama.cpp makes the ids of any text that the tokenizer here makes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import torch
import xllamacpp
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_pipeline.export.gguf_text import write_text
from llava_pipeline.export.vocabulary import LLAMA_3, QWEN_2, vocabulary_of
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.processor import Processor
from llava_pipeline.model.read_processor import add_tokens

WORDS = [
    "the small red circle is at the top left, isn't it? 12 345 6789",
    "naïve café 日本 ½ don't DON'T x\n\n y  z\t!?...",
]
TEXTS = [*WORDS, "", " leading", "two  spaces ", "\n\nlines\r\n \n", "2026-11-28 and 1234567", "emoji 🙂🙃 and ÿ¡"]


def byte_level(*before: pre_tokenizers.PreTokenizer, regex: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    steps = [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    made.train_from_iterator(WORDS * 9, trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=special, show_progress=False,
    ))  # fmt: skip
    return made


def split(pattern: str) -> Tokenizer:
    return byte_level(pre_tokenizers.Split(Regex(pattern), "isolated"), regex=False)


def sentencepiece() -> Tokenizer:
    """As Llama 2's in tokenizer.json: a space before every text, bytes for what is unknown."""
    learned = Tokenizer(models.BPE())
    normaliser = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned.normalizer = normaliser
    learned.train_from_iterator([word for text in WORDS * 9 for word in text.split()],
                                trainers.BpeTrainer(vocab_size=120, show_progress=False))  # fmt: skip
    content = learned.get_vocab()
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(content, key=lambda piece: content[piece])
    merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normaliser
    made.add_special_tokens(special)
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
    "llama-bpe": lambda: split(LLAMA_3),
    "qwen2": lambda: split(QWEN_2),
    "default": sentencepiece,
}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_makes_the_same_ids(kind: str, pocket: Llava, tmp_path: Path) -> None:
    llava = with_tokenizer(pocket, KINDS[kind]())
    assert vocabulary_of(llava).pre == kind
    write_text(tmp_path / "a.gguf", llava, "a", "MIT", "f16")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(tmp_path / "a.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity, parameters.warmup = 64, 1, -1, False
    server = xllamacpp.Server(parameters)
    plain = llava.processor._plain
    for text in TEXTS:
        body = {"content": text, "add_special": False, "parse_special": True}
        reply = requests.post(f"{server.listening_address}/tokenize", json=body, timeout=30).json()
        assert reply["tokens"] == plain.encode(text, add_special_tokens=False).ids, text


def with_tokenizer(pocket: Llava, backend: Tokenizer) -> Llava:
    """The pocket model with another tokenizer and random embeddings for it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    add_tokens(tokenizer, "a test")
    model = copy.deepcopy(pocket.model)
    rows = torch.randn(len(tokenizer), model.config.text_config.hidden_size)
    model.model.language_model.embed_tokens.weight = torch.nn.Parameter(rows, requires_grad=False)
    model.config.text_config.vocab_size = len(tokenizer)
    old = pocket.processor
    return replace(pocket, model=model, processor=Processor(tokenizer, old.template, old.images, old.num_image_tokens))
