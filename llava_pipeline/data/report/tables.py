"""The report's numbers as Markdown tables, for where a page has no room.

What comes from the data is cut and escaped: it makes no link, no picture, no tag and no further cell.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llava_pipeline.contracts import ValidatedData
from llava_pipeline.data.report.facts import FACTS, Side, clean, kinds, meaning, reasons, sides_of, spread
from llava_pipeline.data.report.survey import refusals

MAX_CELL = 80  # characters of a text from the data
MAX_EXAMPLES = 8  # refused rows of one side
_ESCAPED = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": " ", "\t": " "}
    | {sign: f"\\{sign}" for sign in "\\`*_{}[]()|~#!@:$^="}
)


def markdown(data: ValidatedData) -> str:
    """The totals, the refusals with one example of each reason, and the kinds of questions: at most about 20 KB.

    Raises:
        StoreError: a snapshot is not in the store, or damaged.
    """
    sides = sides_of(data)
    totals = [[name, *(cell(fact(side)) for side in sides)] for name, fact in FACTS.items()]
    totals.append(["Tokens of a row", *(spread(side.numbers.tokens) for side in sides)])
    totals.append(["Megapixels of a picture", *(spread(side.numbers.kilopixels, scale=1000) for side in sides)])
    parts = ["## Data report", _table("", sides, totals), "### Refused rows", _refused(sides), *_examples(sides)]
    if told_apart := kinds(sides):
        rows = [[cell(kind, 40), *(f"{number:,}" for number in numbers)] for kind, numbers in told_apart]
        parts += ["### Questions by kind", _table("Kind", sides, rows)]
    return "\n\n".join(parts) + "\n"


def cell(text: str, most: int = MAX_CELL) -> str:
    """A text in which nothing is markup."""
    return re.sub(r"(?i)(www)\.", r"\1\\.", clean(text, most).translate(_ESCAPED))


def _refused(sides: Sequence[Side]) -> str:
    rows = [
        [f"{cell(reason)}: {cell(meaning(reason), 200)}".removesuffix(": ")]
        + [f"{side.snapshot.rejected.get(reason, 0):,}" for side in sides]
        for reason in reasons(sides)
    ]
    return _table("Reason", sides, rows or [["none", *("0" for _ in sides)]])


def _examples(sides: Sequence[Side]) -> list[str]:
    rows = [
        [cell(text, most) for text, most in zip(shown, (20, 40, 40, 40, MAX_CELL), strict=True)]
        for side in sides
        for reason, found in list(refusals(side.snapshot).items())[:MAX_EXAMPLES]
        for shown in [(side.name, reason, found[0].id, f"{found[0].shard}, {found[0].row}", found[0].detail)]
    ]
    return [_lines(["Set", "Reason", "Row", "Shard, row", "Example"], rows)] if rows else []


def _table(first: str, sides: Sequence[Side], rows: Sequence[Sequence[str]]) -> str:
    return _lines([first, *(side.name for side in sides)], rows)


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
