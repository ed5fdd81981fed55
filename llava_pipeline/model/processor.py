"""From a conversation and its picture to ``input_ids``, ``labels`` and ``pixel_values``.

One sample of the pocket profile, image tokens shortened::

    messages   user: [image] "\\nWhat color is the circle?"      assistant: "red"
    rendered   <s><|user|><image>\\nWhat color is the circle?<|assistant|> red</s>
    input_ids  <s> <|user|> [<image> x 16] \\n What  color ...  <|assistant|>  red  </s>
    labels      .      .           .        .   .     .    ...        .         red  </s>      (. is IGNORE_INDEX)

What a person types is never a special token: the template is rendered with placeholders for every text, special
tokens are looked for between the placeholders only, and what lies between two special tokens is tokenised as plain
text. Labels come from the template's own generation marks.

So a rendered template depends on roles and kinds of items alone, and conversations of one form share it: ``lay_out``.
One processor may be used by several threads.
"""

from __future__ import annotations

import copy
import re
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # whoever only checks rows needs no torch, whoever only trains no Pillow
    import torch
    from PIL import Image
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

    def resize(self, image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """An RGB image letterboxed and resized to the tower's side: (S, S, 3) uint8."""
        from PIL import Image

        from llava_pipeline.data.images import letterbox

        square = letterbox(image, self.fill)
        return np.asarray(square.resize((self.side, self.side), Image.Resampling.BICUBIC), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Mark:
    """A special token that the template writes."""

    token: str
    learned: bool


Plain = tuple[tuple[str | int, bool], ...]
"""What lies between two special tokens: words of the template or numbers of texts, each with whether it is learned."""
Form = tuple[tuple[str, tuple[str, ...]], ...]
"""What a template sees of a conversation: of every turn the role and the kinds of its items."""
_RENDERING = threading.Lock()  # a compiled template notes its generation marks in itself


def _form(messages: list[Message]) -> Form:
    return tuple((message["role"], tuple(item["type"] for item in message["content"])) for message in messages)


def _with_placeholders(form: Form) -> list[Message]:
    """Messages of this form, with a numbered placeholder for every text."""
    count = 0
    out = []
    for role, kinds in form:
        content = []
        for kind in kinds:
            content.append({"type": kind})
            if kind == "text":
                content[-1]["text"] = f"\ue000{count}\ue001"
                count += 1
        out.append({"role": role, "content": content})
    return out


def render(
    template: str, special: dict[str, Any], messages: list[Message], add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    """A template applied: text, and the character spans between the generation marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with _RENDERING:
        rendered, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **special,
        )
    return rendered[0], [(start, end) for start, end in spans[0]]


@lru_cache(maxsize=256)
def lay_out(
    template: str,
    special: tuple[tuple[str, Any], ...],
    marks: re.Pattern[str],
    form: Form,
    add_generation_prompt: bool,
) -> tuple[Mark | Plain, ...]:
    """What a template writes for conversations of one form, in order.

    ``special`` are the tokenizer's named tokens, ``marks`` finds those that stand for themselves.
    """
    rendered, spans = render(template, dict(special), _with_placeholders(form), add_generation_prompt)
    edges = sorted({edge for span in spans for edge in span})

    def learned(position: int) -> bool:
        return any(start <= position < end for start, end in spans)

    parts: list[Mark | Plain] = []
    plain: list[tuple[str | int, bool]] = []

    def add_words(start: int, end: int) -> None:
        cuts = [start, *(edge for edge in edges if start < edge < end), end]
        plain.extend((rendered[a:b], learned(a)) for a, b in pairwise(cuts) if a < b)

    position = 0
    for match in re.finditer(f"{_PLACEHOLDER.pattern}|{marks.pattern}", rendered):
        add_words(position, match.start())
        if match[1] is not None:
            plain.append((int(match[1]), learned(match.start())))
        else:
            parts += [tuple(plain), Mark(match[0], learned(match.start()))]
            plain.clear()
        position = match.end()
    add_words(position, len(rendered))
    parts.append(tuple(plain))
    return tuple(part for part in parts if part)


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
        self.special_tokens = tuple(special)
        self._marks = re.compile("|".join(re.escape(token) for token in special))
        named = tokenizer.special_tokens_map.items()
        self._named = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in named)
        # A copy of its own: whoever calls the tokenizer may change how it treats special tokens, and its limits.
        self._plain = copy.deepcopy(tokenizer.backend_tokenizer)
        self._plain.no_truncation()
        self._plain.no_padding()
        self._plain.encode_special_tokens = True

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The template applied: text, and the character spans between the generation marks."""
        return render(self.template, self.tokenizer.special_tokens_map, messages, add_generation_prompt)

    def encode(self, messages: list[Message], add_generation_prompt: bool = False) -> Encoded:
        """Ids and labels of a conversation in the vsft format (``content`` is a list of text and image items)."""
        texts = [item["text"] for message in messages for item in message["content"] if item["type"] == "text"]
        input_ids: list[int] = []
        labels: list[int] = []
        for part in lay_out(self.template, self._named, self._marks, _form(messages), add_generation_prompt):
            if isinstance(part, Mark):
                is_image = part.token == IMAGE_TOKEN
                token = self.tokenizer.convert_tokens_to_ids(part.token)
                ids = [token] * (self.num_image_tokens if is_image else 1)
                input_ids += ids
                labels += ids if part.learned and not is_image else [IGNORE_INDEX] * len(ids)
            else:
                written = [(text if isinstance(text, str) else texts[text], learned) for text, learned in part]
                self._tokenise(written, input_ids, labels)
        return Encoded(input_ids, labels)

    def _tokenise(self, written: Sequence[tuple[str, bool]], input_ids: list[int], labels: list[int]) -> None:
        """Append the ids of plain text, and labels where a token's first character is learned."""
        text = "".join(part for part, _ in written)
        if not text:
            return
        encoding = self._plain.encode(text, add_special_tokens=False)
        ids = encoding.ids
        input_ids += ids
        flags = [learned for part, learned in written if part]
        if all(flags):
            labels += ids
        elif not any(flags):
            labels += [IGNORE_INDEX] * len(ids)
        else:
            ends = list(accumulate(len(part) for part, _ in written if part))
            firsts = (bisect_right(ends, min(start, len(text) - 1)) for start, _ in encoding.offsets)
            labels += [i if flags[part] else IGNORE_INDEX for i, part in zip(ids, firsts, strict=True)]

    def prompt(self, question: str, with_image: bool = True) -> list[int]:
        """Ids that ask one question about a picture, up to where the answer begins."""
        content: list[dict[str, Any]] = [{"type": "image"}] if with_image else []
        content.append({"type": "text", "text": question})
        return self.encode([{"role": "user", "content": content}], add_generation_prompt=True).input_ids

    def resize(self, image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """An RGB image as the tower sees it: (S, S, 3) uint8."""
        return self.images.resize(image)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8 to ``pixel_values`` (B, 3, S, S) float32."""
        import torch

        mean, std = torch.tensor(self.images.mean), torch.tensor(self.images.std)
        scaled = (pixels.to(torch.float32) / 255 - mean.to(pixels.device)) / std.to(pixels.device)
        return scaled.permute(0, 3, 1, 2).contiguous()

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self.words(ids).strip()

    def words(self, ids: list[int]) -> str:
        """The same with the spaces at its ends: text that more may follow."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
