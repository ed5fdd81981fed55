"""Histograms as HTML: bars in plain CSS, the spread in words, and the numbers as a table for whoever wants them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llava_pipeline.data.report.facts import Side, number, share, spread
from llava_pipeline.data.report.histogram import Histogram, histogram
from llava_pipeline.data.report.markup import row, table


def chart(title: str, unit: str, sides: Sequence[Side], values: Sequence[Counter[int]], scale: int = 1) -> str:
    """One histogram over bins that both sides share; words alone where all values are equal, or there are none."""
    told = "".join(
        f'<p><span class="key {side.key}">{side.name}:</span> {spread(found, unit, scale)}</p>\n'
        for side, found in zip(sides, values, strict=True)
    )
    body = _plot(title, unit, sides, histogram(values), scale) if len(set().union(*values)) > 1 else ""
    return f'<section class="chart">\n<h3>{title}</h3>\n{told}{body}</section>\n'


def _plot(title: str, unit: str, sides: Sequence[Side], made: Histogram, scale: int) -> str:
    labels = [bin_label(made, n, scale) for n in range(made.num_bins)]
    highest = max(max(shares) for shares in made.shares)
    bars, rows = [], []
    for n, label in enumerate(labels):
        columns = [(side, made.counts[k][n], made.shares[k][n]) for k, side in enumerate(sides)]
        words = "; ".join(f"{side.name} {count:,}" for side, count, _ in columns)
        inner = "".join(f'<i class="{s.key}" style="height:{100 * part / highest:.2f}%"></i>' for s, _, part in columns)
        bars.append(f'<div title="{label} {unit}: {words}">{inner}</div>')
        rows.append(row(label, [f"{count:,} <small>{share(part, 1)}</small>" for _, count, part in columns]))
    numbers = table(f"{title}, in {unit}, with shares of each set", unit.capitalize(), sides, rows, "numbers")
    return (
        f'<div class="top" aria-hidden="true">{share(highest, 1)}</div>\n'
        f'<div class="plot" role="img" aria-label="Histogram of {title.lower()} in {unit}: {made.num_bins} bins, '
        f'from {labels[0]} to {labels[-1]}">{"".join(bars)}</div>\n'
        f'<div class="axis" aria-hidden="true"><span>{number(made.edges[0], scale)}</span><span>{unit}</span>'
        f"<span>{labels[-1] if made.open_end else number(made.edges[-1], scale)}</span></div>\n"
        f"<details><summary>Numbers</summary>\n{numbers}</details>\n"
    )


def bin_label(made: Histogram, n: int, scale: int) -> str:
    """``64 to 79``, or ``64`` for a bin of one whole number, or ``480 and more`` for a last one without an end."""
    low, high = made.edges[n], made.edges[n + 1]
    if made.open_end and n == made.num_bins - 1:
        return f"{number(low, scale)} and more"
    return number(low, scale) if high - low == 1 else f"{number(low, scale)} to {number(high - 1, scale)}"
