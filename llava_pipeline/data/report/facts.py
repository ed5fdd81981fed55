"""The numbers of both snapshots, and what is said about them in words. Nothing here is escaped yet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_pipeline.contracts import Cursor, Snapshot, ValidatedData
from llava_pipeline.data import checks, leakage
from llava_pipeline.data.report.histogram import quantile
from llava_pipeline.data.report.survey import Numbers, count

MAX_KINDS = 20  # lines of the table; the rest is added up
REASONS = checks.REASONS | leakage.REASONS
# Control characters, those that turn the direction of what stands beside them, and halves of surrogate pairs.
_NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two snapshots with its numbers. ``key`` names its colour, ``name`` is for people."""

    key: str
    name: str
    snapshot: Snapshot
    numbers: Numbers

    @property
    def num_refused(self) -> int:
        """Over all reasons."""
        return sum(self.snapshot.rejected.values())


def sides_of(data: ValidatedData) -> tuple[Side, Side]:
    """Both sides, counted.

    Raises:
        StoreError: a snapshot is not in the store, or damaged.
    """
    return (
        Side("train", "Training", data.train, count(data.train)),
        Side("held-out", "Held out", data.held_out, count(data.held_out)),
    )


def share(part: float, whole: float) -> str:
    """``12.5 %``; what is little but not nothing does not become 0, and not quite all does not become 100."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.1:
        return "under 0.1 %"
    if 99.9 < percent < 100:
        return "over 99.9 %"
    return f"{percent:.1f}".removesuffix(".0") + " %"


def clean(text: str, most: int) -> str:
    """A text from the data, cut, without the characters that hide or turn around what stands beside them."""
    shown = _NOT_SHOWN.sub("\ufffd", text[:most]).strip()
    return shown if len(text) <= most else f"{shown} … ({len(text) - most:,} more characters)"


def number(value: int, scale: int = 1) -> str:
    """``1,234``, or in thousands ``1.234``."""
    return f"{value:,}" if scale == 1 else f"{value / scale:,.3f}".rstrip("0").rstrip(".")


def spread(values: Counter[int], unit: str = "", scale: int = 1) -> str:
    """``12 to 480 tokens, half of them up to 96``."""
    if not values:
        return "none"
    low, high = min(values), max(values)
    if low == high:
        return f"all {number(low, scale)} {unit}".strip()
    half = number(quantile(values, 0.5), scale)
    lowest = number(low, scale) if low or scale == 1 else f"under {number(1, scale)}"
    return f"{lowest} to {f'{number(high, scale)} {unit}'.strip()}, half of them up to {half}"


def _with_share(part: int, whole: int) -> str:
    return f"{part:,} ({share(part, whole)})"


def _left(side: Side) -> str:
    left = side.snapshot.num_left
    return "no end, or not known" if left is None else f"{left:,}"


def _place(place: Cursor) -> str:
    return f"shard {place.shard:,}, row {place.row:,}"


FACTS: dict[str, Callable[[Side], str]] = {
    "Origin": lambda side: side.snapshot.origin,
    "Digest": lambda side: side.snapshot.rows.digest,
    "Rows read": lambda side: f"{side.snapshot.num_read:,}",
    "Rows kept": lambda side: _with_share(side.snapshot.num_kept, side.snapshot.num_read),
    "Rows refused": lambda side: _with_share(side.num_refused, side.snapshot.num_read),
    "Reading began at": lambda side: _place(side.snapshot.began),
    "Next row to read": lambda side: _place(side.snapshot.ended),
    "Rows left in the source": _left,
    "Rows without a picture": lambda side: f"{side.numbers.num_text_only:,}",
    "Pictures": lambda side: f"{side.snapshot.num_images:,}",
    "Pictures like an earlier one": lambda side: _with_share(
        side.snapshot.num_near_duplicates, side.snapshot.num_images
    ),
    "Tokens": lambda side: f"{side.snapshot.num_tokens:,}",
    "Tokens that are learned": lambda side: _with_share(side.snapshot.num_supervised_tokens, side.snapshot.num_tokens),
}


def findings(side: Side) -> str:
    """What somebody who reads one sentence should know."""
    kept = side.snapshot
    said = f"{kept.num_kept:,} of {kept.num_read:,} rows were kept"
    if side.num_refused:
        leading = max(kept.rejected, key=lambda reason: kept.rejected[reason])
        said += f", {side.num_refused:,} refused, most often as {leading} ({kept.rejected[leading]:,})"
    said += f"; {share(kept.num_supervised_tokens, kept.num_tokens)} of the tokens are learned."
    if missing := kept.num_read - kept.num_kept - side.num_refused:
        said += f" The totals do not reconcile: {abs(missing):,} rows {'are missing' if missing > 0 else 'too many'}."
    return said


def meaning(reason: str) -> str:
    """The sentence that belongs to a reason; empty where there is none."""
    return REASONS.get(reason, "")


def reasons(sides: Sequence[Side]) -> list[str]:
    """Reasons that were given on any side, the leading one first."""
    counted: Counter[str] = Counter()
    for side in sides:
        counted.update(side.snapshot.rejected)
    return sorted((reason for reason, times in counted.items() if times), key=lambda name: (-counted[name], name))


def kinds(sides: Sequence[Side]) -> list[tuple[str, list[int]]]:
    """Kinds of questions with their number on each side, the most frequent first; empty where none are told apart."""
    names = {kind for side in sides for kind in side.numbers.kinds}
    if names <= {"all"}:
        return []
    rows = [(name, [side.numbers.kinds[name] for side in sides]) for name in names]
    rows.sort(key=lambda row: (-sum(row[1]), row[0]))
    if rest := rows[MAX_KINDS:]:
        sums = [sum(counts[n] for _, counts in rest) for n in range(len(sides))]
        rows[MAX_KINDS:] = [(f"{len(rest):,} more kinds", sums)]
    return rows
