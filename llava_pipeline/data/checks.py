"""One pure function per reason for which a row is refused. Each gives None or a detail for people."""

from __future__ import annotations

from collections.abc import Callable

from llava_pipeline.data.record import Record

Check = Callable[[Record], str | None]


def no_messages(record: Record) -> str | None:
    """A conversation needs a question and an answer."""
    return None if len(record.messages) >= 2 else f"{len(record.messages)} messages"


def roles_out_of_order(record: Record) -> str | None:
    """user, assistant, user, assistant, ..., ending with the assistant."""
    roles = [message["role"] for message in record.messages]
    wanted = ["user", "assistant"] * (len(roles) // 2)
    return None if roles == wanted else "roles are " + ", ".join(roles[:6])


def empty_turn(record: Record) -> str | None:
    """Every turn says something."""
    for number, message in enumerate(record.messages):
        if not any(item["type"] == "text" and item["text"].strip() for item in message["content"]):
            return f"turn {number} has no text"
    return None


def image_count_mismatch(record: Record) -> str | None:
    """As many image markers as images."""
    if record.num_markers == len(record.images):
        return None
    return f"{record.num_markers} image markers, {len(record.images)} images"


def not_one_image(record: Record) -> str | None:
    """Exactly one image, in the first turn: what the LLaVA recipe trains on."""
    if len(record.images) != 1:
        return f"{len(record.images)} images"
    if not any(item["type"] == "image" for item in record.messages[0]["content"]):
        return "the image is not in the first turn"
    return None


STRUCTURE: dict[str, Check] = {
    check.__name__: check
    for check in (no_messages, roles_out_of_order, empty_turn, image_count_mismatch, not_one_image)
}
REASONS = (
    "malformed",
    *STRUCTURE,
    *("image_too_many_bytes", "image_unreadable", "image_too_many_pixels", "image_too_long", "image_too_small"),
    *("too_many_tokens", "nothing_supervised"),
)
