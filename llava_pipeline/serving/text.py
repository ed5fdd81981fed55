"""Tokens to text as it can be shown: whole characters, nothing of a stop string, no space at either end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # what a tokenizer writes for bytes that are not a whole character yet


class TextStream:
    """Text of an answer, piece by piece.

    Args:
        decode: text of token ids, special tokens left out.
        stops: strings that end the answer; neither they nor a beginning of them at its end are shown.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode, self.stops = decode, tuple(stop for stop in stops if stop)
        self.ids: list[int] = []
        self.known = ""  # text of the tokens that are whole characters
        self.begun = 0  # number of tokens that ``known`` is the text of
        self.context = 0  # where the last text of these began
        self.shown = 0  # characters of the answer that were given out
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown after one more token; ``stopped`` tells whether it ended with a stop string."""
        self.ids.append(token)
        return "" if (text := self._new()).endswith(INCOMPLETE) else self._known(text)

    def finish(self) -> str:
        """What was held back and belongs to the answer."""
        return "" if self.stopped else self._known(self._new(), ended=True)

    def _new(self) -> str:
        """Text of the tokens that are not known yet.

        The last text before them is decoded with them, because some tokenizers write a first token without the space
        before it. It begins where a text began: a cut within a character would spoil all of its tokens.
        """
        before = self.decode(self.ids[self.context : self.begun])
        return self.decode(self.ids[self.context :])[len(before) :]

    def _known(self, text: str, ended: bool = False) -> str:
        if text:
            self.context = self.begun
        self.known += text
        self.begun = len(self.ids)
        return self._show(ended)

    def _show(self, ended: bool) -> str:
        text = self.known.lstrip()
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            text = text[: min(places)]
        elif not ended:
            text = text[: len(text) - self._held(text)]
        whole = text.rstrip()
        piece = whole[self.shown :]
        self.shown = max(self.shown, len(whole))
        return piece

    def _held(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
