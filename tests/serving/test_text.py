"""Text as it is shown piece by piece is the text as a whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llava_pipeline.serving.text import TextStream

BYTES = st.text(max_size=40).map(lambda text: list(text.encode()))


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def shown(ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(decode, stops)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


def test_a_character_of_several_tokens_is_never_split() -> None:
    pieces = shown(list("a 😀 b".encode()))
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == "a 😀 b"


def test_nothing_of_a_stop_string_is_shown_and_what_only_began_like_one_is() -> None:
    assert "".join(shown(list(b"one END two"), ("END",))) == "one"
    assert "".join(shown(list(b"one EN"), ("END",))) == "one EN"


def test_spaces_at_both_ends_are_not_shown_and_those_between_are() -> None:
    assert "".join(shown(list(b"  a  b  "))) == "a  b"


@given(BYTES)
def test_the_pieces_make_the_answer(ids: list[int]) -> None:
    assert "".join(shown(ids)) == decode(ids).strip()
