"""Parts of HTML that every section needs. Whatever comes from the data goes through ``text``."""

from __future__ import annotations

import html
from collections.abc import Sequence

from llava_pipeline.data.report.facts import Side, clean, share

MAX_TEXT = 400  # characters of a text from the data


def text(found: str, most: int = MAX_TEXT, more: str = "") -> str:
    """A text from the data, cut and escaped; its direction of writing does not reach what stands beside it."""
    return f'<span class="data{more}" dir="auto">{html.escape(clean(found, most))}</span>'


def name(found: str) -> str:
    """The name of a reason, which may be broken after an underscore."""
    return f"<code>{text(found, 80).replace('_', '_<wbr>')}</code>"


def attribute(found: str, most: int = MAX_TEXT) -> str:
    """A text from the data, cut and escaped, for between double quotes."""
    return html.escape(clean(found, most).replace("\n", " "))


def table(caption: str, first: str, sides: Sequence[Side], rows: Sequence[str], style: str = "") -> str:
    """A table with one column of names and one for each side; ``rows`` are made by ``row``."""
    heads = "".join(f'<th scope="col" class="{side.key}">{side.name}</th>' for side in sides)
    return (
        f'<table class="{style}">\n<caption>{caption}</caption>\n'
        f'<thead><tr><th scope="col">{first}</th>{heads}</tr></thead>\n<tbody>\n{"".join(rows)}</tbody>\n</table>\n'
    )


def row(head: str, cells: Sequence[str]) -> str:
    """One line of a table; its head and its cells are HTML already."""
    return f'<tr><th scope="row">{head}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'


def counted(side: Side, part: int, whole: int) -> str:
    """A number, its share and a bar as long as the share."""
    if not part:
        return '<span class="muted">none</span>'
    bar = f'<div class="bar {side.key}"><i style="width:{100 * part / whole:.2f}%"></i></div>'
    return f"{part:,} <small>{share(part, whole)}</small>{bar}"
