"""A tokenizer in llama.cpp's terms: pieces with their kinds, merges or scores, and how text is split before.

llama.cpp has two of the kinds that tokenizer.json can describe: byte-level BPE (``gpt2``), whose way of splitting text
is known by name, and SentencePiece's BPE with bytes for what is unknown (``llama``).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType

from llava_pipeline.errors import ExportRefused
from llava_pipeline.evaluation.read import stop_ids
from llava_pipeline.export.template import exported_template

if TYPE_CHECKING:
    from llava_pipeline.model.assemble import Llava

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3, QWEN_2 = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST
_SPLITS = {LLAMA_3: "llama-bpe", QWEN_2: "qwen2"}
_WORST = -1e9  # score of a piece that no merge makes


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What stands in a GGUF under ``tokenizer.ggml``."""

    model: str  # gpt2 or llama
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]  # of gpt2
    scores: list[float]  # of llama
    space_prefix: bool


def vocabulary_of(llava: Llava) -> Vocabulary:
    """The tokenizer of a model.

    Raises:
        ExportRefused: llama.cpp does not have one like it.
    """
    tokenizer = llava.processor.tokenizer
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ExportRefused(f"the tokenizer is a {model['type']}, of which llama.cpp's GGUF has BPE alone; use --to hf")
    tokens, kinds = _pieces(content, len(tokenizer))
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    steps = list(_steps(content))
    if any(step["type"] == "ByteLevel" for step in steps):
        merges = [" ".join(pair) for pair in pairs]
        return Vocabulary("gpt2", _name_of_split(content, steps), tokens, kinds, merges, [], False)
    if not model.get("byte_fallback"):
        raise ExportRefused("the tokenizer's BPE is neither byte-level nor falls back to bytes; use --to hf")
    rank: dict[str, int] = {}
    for place, pair in enumerate(pairs):
        rank.setdefault("".join(pair), place)
    scores = [-float(rank[token]) if token in rank else _WORST for token in tokens]
    return Vocabulary("llama", "default", tokens, kinds, [], scores, _prefixes_space(content, steps))


def write_vocabulary(writer: GGUFWriter, llava: Llava) -> None:
    """Write the tokenizer and the chat template."""
    found, tokenizer = vocabulary_of(llava), llava.processor.tokenizer
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.kinds)
    if found.model == "gpt2":
        writer.add_token_merges(found.merges)
    else:
        writer.add_token_scores(found.scores)
    writer.add_add_space_prefix(found.space_prefix)
    writer.add_add_bos_token(begins_with_bos(llava))
    writer.add_add_eos_token(False)
    ends = stop_ids(llava)
    eos = tokenizer.eos_token_id
    writer.add_eos_token_id(eos)
    if others := sorted(ends - {eos}):
        writer.add_eot_token_id(others[0])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(exported_template(llava.processor.template, llama_cpp=True))


def begins_with_bos(llava: Llava) -> bool:
    """Whether a prompt begins with ``bos``, which llama.cpp takes away from the template's text and puts itself."""
    bos = llava.processor.tokenizer.bos_token_id
    return bos is not None and llava.processor.prompt("?", with_image=False)[0] == bos


def _pieces(content: dict[str, Any], count: int) -> tuple[list[str], list[int]]:
    """Every token by its id, and its kind; an id without a token is named and never used."""
    tokens = [f"[PAD{number}]" for number in range(count)]
    kinds = [int(TokenType.UNUSED)] * count
    for token, number in content["model"]["vocab"].items():
        tokens[number] = token
        kinds[number] = int(TokenType.BYTE if _BYTE.fullmatch(token) else TokenType.NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    unknown = content["model"].get("unk_token")
    if unknown is not None and content["model"].get("byte_fallback"):
        kinds[content["model"]["vocab"][unknown]] = int(TokenType.UNKNOWN)
    return tokens, kinds


def _steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of the pre-tokenizer, one behind the other."""
    found = content["pre_tokenizer"]
    if found is None:
        return []
    return list(found["pretokenizers"]) if found["type"] == "Sequence" else [found]


def _name_of_split(content: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    """llama.cpp's name for the way that text is split before byte-level BPE."""
    *before, last = steps
    normaliser = content["normalizer"]
    plain = normaliser is None or normaliser["type"] == "NFC"
    if plain and last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if last.get("use_regex", True):
            if not before:
                return "gpt-2"
            if len(before) == 1 and before[0] == {"type": "Digits", "individual_digits": True}:
                return "smollm"
        elif len(before) == 1 and before[0]["type"] == "Split" and before[0]["behavior"] == "Isolated":
            name = _SPLITS.get(before[0]["pattern"].get("Regex", ""))
            if name is not None:
                return name
    told = " + ".join(step["type"] for step in steps)
    raise ExportRefused(
        f"the tokenizer splits text by {told}, which is none of the ways that this export knows llama.cpp's name of "
        "(GPT-2's, SmolLM's, Llama 3's, Qwen 2's); use --to hf"
    )


def _prefixes_space(content: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether a text is read as if a space stood before it."""
    normaliser = content["normalizer"]
    every = [] if normaliser is None else normaliser.get("normalizers", [normaliser])
    return any(step["type"] == "Prepend" for step in every) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
    )
