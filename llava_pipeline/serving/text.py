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
        self.decode, self.stops = decode, tuple(stops)
        self.ids: list[int] = []
        self.known = ""  # text of the tokens that are whole characters
        self.begun = 0  # number of tokens that ``known`` is the text of
        self.shown = 0  # characters of the answer that were given out
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown after one more token; ``stopped`` tells whether it ended with a stop string."""
        self.ids.append(token)
        # A few tokens of context, because some tokenizers write a first token without the space before it.
        context = max(0, self.begun - 4)
        before = self.decode(self.ids[context : self.begun])
        after = self.decode(self.ids[context:])
        if after.endswith(INCOMPLETE):
            return ""
        self.known += after[len(before) :]
        self.begun = len(self.ids)
        return self._show(held=self._held())

    def finish(self) -> str:
        """What was held back and belongs to the answer."""
        if self.stopped:
            return ""
        context = max(0, self.begun - 4)
        self.known += self.decode(self.ids[context:])[len(self.decode(self.ids[context : self.begun])) :]
        self.begun = len(self.ids)
        return self._show(held=0)

    def _show(self, held: int) -> str:
        text = self.known.lstrip()
        ends = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            text = text[: min(ends)]
        else:
            text = text[: len(text) - held]
        whole = text.rstrip()
        piece = whole[self.shown :]
        self.shown = max(self.shown, len(whole))
        return piece

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        text = self.known
        longest = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
