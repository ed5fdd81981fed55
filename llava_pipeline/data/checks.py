"""One pure function per reason for which a row is refused. Each gives None or a detail for people.

A function's name is its reason, and the first line of its docstring says what is asked of a row. They are listed in
the order in which a row meets them: whoever costs less comes first. What only other rows can tell is in ``leakage``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from llava_pipeline.data.images import MAX_ASPECT, MAX_BYTES, MAX_PIXELS, MAX_SQUARE, MIN_SIDE
from llava_pipeline.data.record import Record
from llava_pipeline.model.processor import IGNORE_INDEX, Encoded

Check = Callable[[Record], str | None]
ROLES = ("user", "assistant")
MAX_BYTES_PER_TOKEN = 64
"""No text comes near: it has four or five bytes a token, and only runs of white space have many more."""

# --------------------------------------------------------------------------------------------- structure


def no_messages(record: Record) -> str | None:
    """A conversation needs a question and an answer."""
    return None if len(record.messages) >= 2 else f"{len(record.messages)} in all, at least 2"


def unknown_role(record: Record) -> str | None:
    """Every turn is the user's or the assistant's."""
    for number, message in enumerate(record.messages):
        if message["role"] not in (*ROLES, "system"):
            return f"turn {number} is by {message['role'][:40]!r}, not by {' or '.join(ROLES)}"
    return None


def system_turn(record: Record) -> str | None:
    """Nobody but user and assistant speaks: the chat template writes the system prompt, or none."""
    for number, message in enumerate(record.messages):
        if message["role"] == "system":
            return f"turn {number} is the system's"
    return None


def roles_out_of_order(record: Record) -> str | None:
    """user, assistant, user, assistant, ..., ending with the assistant."""
    roles = [message["role"] for message in record.messages]
    for number, role in enumerate(roles):
        if role != ROLES[number % 2]:
            return f"turn {number} of {len(roles)} is the {role}'s"
    return None if len(roles) % 2 == 0 else f"the last of {len(roles)} turns is the {roles[-1]}'s"


def empty_turn(record: Record) -> str | None:
    """Every turn says something."""
    for number, text in enumerate(record.texts):
        if not text or text.isspace():
            return f"turn {number} has no text"
    return None


def image_count_mismatch(record: Record) -> str | None:
    """As many image markers as images."""
    if record.num_markers == len(record.images):
        return None
    return f"{record.num_markers} image markers, {len(record.images)} images"


def no_image(record: Record) -> str | None:
    """A picture is talked about (unless data.text_only=keep)."""
    return None if record.images else "0 images, at least 1 unless data.text_only=keep"


def not_one_image(record: Record) -> str | None:
    """Not more than one image: what the LLaVA recipe trains on."""
    return None if len(record.images) <= 1 else f"{len(record.images)} images, at most 1"


def image_not_first(record: Record) -> str | None:
    """The image is shown in the first turn."""
    for number, message in enumerate(record.messages[1:], start=1):
        if any(item["type"] == "image" for item in message["content"]):
            return f"it is shown in turn {number}, by the {message['role']}"
    return None


STRUCTURE: dict[str, Check] = {
    check.__name__: check
    for check in (
        *(no_messages, unknown_role, system_turn, roles_out_of_order, empty_turn),
        *(image_count_mismatch, no_image, not_one_image, image_not_first),
    )
}

# --------------------------------------------------------------------------------------------- text

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_WELL_KNOWN = (
    r"<\|\w{1,40}\|>",  # <|im_start|>, <|system|>, <|eot_id|>, <|endoftext|>, ...
    r"<\uff5c[^\uff5c<>]{1,40}\uff5c>",  # DeepSeek's, with wide bars
    *(r"</?s>", r"<(?:bos|eos|pad|unk|mask)>", r"\[/?INST\]", r"<</?SYS>>", r"<(?:start|end)_of_turn>"),
    *(r"<image>", r"<im_(?:start|end|patch)>", r"<__media__>"),
)


def num_text_bytes(record: Record) -> int:
    """Bytes of all that is said."""
    return sum(len(text.encode()) for text in record.texts)


def text_too_long(record: Record, max_tokens: int) -> str | None:
    """Not so much text, or so many turns, that no tokenizer makes them fit; nothing is tokenised to tell."""
    if len(record.messages) > max_tokens:
        return f"{len(record.messages)} turns, at most {max_tokens} tokens"
    most = MAX_BYTES_PER_TOKEN * max_tokens
    found = num_text_bytes(record)
    return None if found <= most else f"{found} bytes, at most {MAX_BYTES_PER_TOKEN} for each of {max_tokens} tokens"


def control_characters(record: Record) -> str | None:
    """No C0 or C1 control character in a text but line feed, tab and carriage return."""
    for number, text in enumerate(record.texts):
        if found := _CONTROL.search(text):
            return f"turn {number} has U+{ord(found[0]):04X} at character {found.start()}"
    return None


def special_token_in_text(record: Record, special_tokens: tuple[str, ...]) -> str | None:
    """No special token typed as text: of this tokenizer, or a mark of a well-known chat template."""
    typed = _typed(special_tokens)
    for number, text in enumerate(record.texts):
        if found := typed.search(text):
            return f"turn {number} says {found[0]!r} at character {found.start()}"
    return None


@lru_cache(maxsize=8)
def _typed(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join([*map(re.escape, special_tokens), *_WELL_KNOWN]))


# --------------------------------------------------------------------------------------------- tokens and labels


def too_many_tokens(encoded: Encoded, max_tokens: int) -> str | None:
    """At most data.max_tokens, image tokens included (if data.when_too_long=refuse)."""
    found = len(encoded.input_ids)
    return None if found <= max_tokens else f"{found} tokens, at most {max_tokens}"


def answer_cut(first_round: Encoded, max_tokens: int) -> str | None:
    """The first round fits whole into data.max_tokens (if data.when_too_long=cut)."""
    found = len(first_round.input_ids)
    return None if found <= max_tokens else f"the first round alone takes {found} tokens, at most {max_tokens}"


def nothing_supervised(encoded: Encoded) -> str | None:
    """At least one token is learned: one between the template's generation marks."""
    if any(label != IGNORE_INDEX for label in encoded.labels):
        return None
    return f"none of {len(encoded.labels)} tokens lies between the template's generation marks"


# --------------------------------------------------------------------------------------------- all of them

UNREAD = {
    "shard_unreadable": "The part of the file that holds the row can be read.",
    "schema_drift": "The columns are there, with the types that the rest of the data set has.",
    "image_path_escapes": "A picture's path stays inside the image folder.",
    "image_missing": "The picture that a row names is there, and can be read.",
    "caption_missing": "A picture has a caption beside it that says something.",
    "malformed": "Every field is there, of the right type, and valid Unicode.",
}
"""Of rows that are no records; told by the sources and by ``record.normalise``."""

IMAGE_GATE = {
    "image_too_many_bytes": f"At most {MAX_BYTES // 2**20} MiB, encoded.",
    "image_unreadable": "A PNG, JPEG, WebP, GIF or BMP whose first frame decodes whole.",
    "image_too_many_pixels": f"At most {MAX_PIXELS // 10**6} million pixels, "
    f"and {MAX_SQUARE // 10**6} once it is put on a square; by the header: nothing is decoded.",
    "image_too_small": f"At least {MIN_SIDE} pixels on a side.",
    "image_too_long": f"At most {MAX_ASPECT} times as long as wide.",
}
"""Of pictures; told by ``images.decode``."""


def _sentence(check: Callable[..., str | None]) -> str:
    return (check.__doc__ or "").splitlines()[0]


REASONS: dict[str, str] = {
    **UNREAD,
    **{name: _sentence(check) for name, check in STRUCTURE.items()},
    **{check.__name__: _sentence(check) for check in (text_too_long, control_characters, special_token_in_text)},
    **IMAGE_GATE,
    **{check.__name__: _sentence(check) for check in (too_many_tokens, answer_cut, nothing_supervised)},
}
"""Every reason of a row's own, in order, with what is asked of a row."""
