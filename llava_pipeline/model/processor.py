"""From a conversation and its picture to ``input_ids``, ``labels`` and ``pixel_values``.

One sample of the pocket profile, image tokens shortened::

    messages   user: [image] "\\nWhat color is the circle?"      assistant: "red"
    rendered   <s><|user|><image>\\nWhat color is the circle?<|assistant|> red</s>
    input_ids  <s> <|user|> [<image> x 16] \\n What  color ...  <|assistant|>  red  </s>
    labels      .      .           .        .   .     .    ...        .         red  </s>      (. is IGNORE_INDEX)

What a person types is never a special token: the template is rendered with placeholders for every text, special
tokens are looked for between the placeholders only, and what lies between two special tokens is tokenised as plain
text. Labels come from the template's own generation marks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from llava_pipeline.data.images import letterbox

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORE_INDEX = -100
IMAGE_TOKEN = "<image>"
Message = dict[str, Any]
_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids with the image tokens expanded, and labels of the same length."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What a vision tower wants to see: side in pixels, mean and standard deviation per channel in [0, 1]."""

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour, which is zero after normalisation: what letterboxing adds means nothing to the tower."""
        red, green, blue = (round(channel * 255) for channel in self.mean)
        return red, green, blue


def _with_placeholders(messages: list[Message]) -> tuple[list[Message], list[str]]:
    """The messages with every text replaced by a placeholder, and the texts."""
    texts: list[str] = []
    out = []
    for message in messages:
        content = []
        for item in message["content"]:
            if item["type"] == "text":
                content.append({"type": "text", "text": f"\ue000{len(texts)}\ue001"})
                texts.append(item["text"])
            else:
                content.append({"type": item["type"]})
        out.append({"role": message["role"], "content": content})
    return out, texts


class Processor:
    """Tokenizer, template and image settings of one assembled model."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, template: str, images: ImageSettings, num_image_tokens: int
    ) -> None:
        self.tokenizer, self.template, self.images = tokenizer, template, images
        self.num_image_tokens = num_image_tokens
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        # tokenizer.json may mark more tokens as special than the tokenizer has names for.
        marked = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted(marked | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(re.escape(token) for token in special))

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The template applied: text, and the character spans between the generation marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **self.tokenizer.special_tokens_map,
        )
        return rendered[0], [(start, end) for start, end in spans[0]]

    def encode(self, messages: list[Message], add_generation_prompt: bool = False) -> Encoded:
        """Ids and labels of a conversation in the vsft format (``content`` is a list of text and image items)."""
        masked, texts = _with_placeholders(messages)
        rendered, spans = self.render(masked, add_generation_prompt)
        input_ids: list[int] = []
        labels: list[int] = []
        piece: list[tuple[str, bool]] = []

        def learned(position: int) -> bool:
            return any(start <= position < end for start, end in spans)

        def flush() -> None:
            ids, flags = self._tokenise(piece)
            input_ids.extend(ids)
            labels.extend(i if flag else IGNORE_INDEX for i, flag in zip(ids, flags, strict=True))
            piece.clear()

        for text, start, is_special in self._split(rendered):
            if is_special:
                flush()
                token = self.tokenizer.convert_tokens_to_ids(text)
                count = self.num_image_tokens if text == IMAGE_TOKEN else 1
                input_ids.extend([token] * count)
                labels.extend([token if learned(start) and text != IMAGE_TOKEN else IGNORE_INDEX] * count)
            elif found := _PLACEHOLDER.fullmatch(text):
                piece.append((texts[int(found[1])], learned(start)))
            else:
                piece.extend((text[k], learned(start + k)) for k in range(len(text)))
        flush()
        return Encoded(input_ids, labels)

    def _split(self, rendered: str) -> list[tuple[str, int, bool]]:
        """(text, start, is special token) parts of a rendered template, placeholders on their own."""
        parts: list[tuple[str, int, bool]] = []
        position = 0
        for match in re.finditer(f"{_PLACEHOLDER.pattern}|{self._special.pattern}", rendered):
            if match.start() > position:
                parts.append((rendered[position : match.start()], position, False))
            parts.append((match[0], match.start(), match[1] is None))
            position = match.end()
        if position < len(rendered):
            parts.append((rendered[position:], position, False))
        return parts

    def _tokenise(self, piece: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
        """Ids of plain text and, per token, whether its first character is learned."""
        text = "".join(part for part, _ in piece)
        if not text:
            return [], []
        flags = [flag for part, flag in piece for _ in part]
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        starts = [min(start, len(flags) - 1) for start, _ in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), [flags[start] for start in starts]

    def prompt(self, question: str, with_image: bool = True) -> list[int]:
        """Ids that ask one question about a picture, up to where the answer begins."""
        content: list[dict[str, Any]] = [{"type": "image"}] if with_image else []
        content.append({"type": "text", "text": question})
        return self.encode([{"role": "user", "content": content}], add_generation_prompt=True).input_ids

    def resize(self, image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """An RGB image letterboxed and resized to the tower's side: (S, S, 3) uint8."""
        side = self.images.side
        square = letterbox(image, self.images.fill)
        return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.uint8)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8 to ``pixel_values`` (B, 3, S, S) float32."""
        mean, std = torch.tensor(self.images.mean), torch.tensor(self.images.std)
        scaled = (pixels.to(torch.float32) / 255 - mean.to(pixels.device)) / std.to(pixels.device)
        return scaled.permute(0, 3, 1, 2).contiguous()

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
