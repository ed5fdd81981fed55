"""The report as one page of HTML that needs nothing but itself.

What comes from the data is cut and escaped, and the page's own policy forbids scripts and addresses altogether.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from llava_pipeline.contracts import ValidatedData
from llava_pipeline.data.report import survey
from llava_pipeline.data.report.charts import chart
from llava_pipeline.data.report.facts import FACTS, Side, findings, kinds, meaning, reasons, sides_of
from llava_pipeline.data.report.markup import counted, name, row, table, text
from llava_pipeline.data.report.pictures import pair_section, sample_section

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(data: ValidatedData) -> str:
    """The report as one HTML document, pictures and style contained. The same data give the same page.

    Raises:
        StoreError: a snapshot is not in the store, or damaged.
    """
    sides = sides_of(data)
    style = resources.files("llava_pipeline.data.report").joinpath("page.css").read_text(encoding="utf-8")
    sections = (_totals, _refused, _sizes, _kinds, sample_section, pair_section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Data report</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n<h1>Data report</h1>\n"
        f"{_lede(sides)}\n{''.join(section(sides) for section in sections)}</main>\n"
        "<footer>Everything on this page is contained in it; nothing is loaded from anywhere.</footer>\n"
        "</body>\n</html>\n"
    )


def _lede(sides: Sequence[Side]) -> str:
    return "\n".join(
        f'<p class="lede"><strong class="key {side.key}">{side.name}:</strong> {text(findings(side))}</p>'
        for side in sides
    )


def _totals(sides: Sequence[Side]) -> str:
    rows = [
        row(what, [text(fact(side), more=" digest" if what == "Digest" else "") for side in sides])
        for what, fact in FACTS.items()
    ]
    return (
        f"<h2>Totals</h2>\n{table('Rows kept and rows refused make up the rows read', 'What', sides, rows, 'totals')}"
    )


def _refused(sides: Sequence[Side]) -> str:
    title = "<h2>Refused rows</h2>\n"
    given = reasons(sides)
    if not given:
        return f'{title}<p class="muted">No row was refused in either set.</p>\n'
    rows = [
        row(
            f"{name(reason)}<p>{text(meaning(reason))}</p>",
            [counted(side, side.snapshot.rejected.get(reason, 0), side.num_refused) for side in sides],
        )
        for reason in given
    ]
    caption = "Each reason with its rule; the first that a row breaks counts. Shares are of the refused rows"
    return f"{title}{table(caption, 'Reason', sides, rows)}{_examples(sides, given)}"


def _examples(sides: Sequence[Side], given: Sequence[str]) -> str:
    """The first refused rows of each reason, folded but for the leading one."""
    found = [(side, survey.refusals(side.snapshot)) for side in sides]
    parts: list[str] = []
    for reason in given:
        if items := "".join(_example(side, refused) for side, all_ in found for refused in all_.get(reason, ())):
            unfolded = "" if parts else " open"
            parts.append(
                f'<details{unfolded}><summary>{name(reason)}</summary>\n<ul class="examples">\n{items}</ul></details>\n'
            )
    return f"<h3>Examples of each reason</h3>\n{''.join(parts)}" if parts else ""


def _example(side: Side, refused: survey.Refusal) -> str:
    who = text(refused.id, 120) if refused.id else '<span class="muted">without an id</span>'
    where = f"{side.name}, shard {text(refused.shard, 120)}, row {text(refused.row, 20)}"
    if refused.digest:
        where += f", content {text(refused.digest[:12], more=' digest')}"
    return f'<li class="{side.key}"><p>{who}: {text(refused.detail)}</p><p class="where">{where}</p></li>\n'


def _sizes(sides: Sequence[Side]) -> str:
    charts = (
        chart("Conversation length", "tokens", sides, [side.numbers.tokens for side in sides]),
        chart("Picture size", "megapixels", sides, [side.numbers.kilopixels for side in sides], 1000),
        chart("Picture width", "pixels", sides, [side.numbers.widths for side in sides]),
        chart("Picture height", "pixels", sides, [side.numbers.heights for side in sides]),
    )
    return (
        "<h2>How long, how large</h2>\n"
        "<p>Image tokens count as tokens. A picture counts once, however many rows show it. "
        f'Bars are shares of each set.</p>\n<div class="charts">\n{"".join(charts)}</div>\n'
    )


def _kinds(sides: Sequence[Side]) -> str:
    title = "<h2>Questions by kind</h2>\n"
    wholes = [side.numbers.kinds.total() for side in sides]
    told_apart = kinds(sides)
    if not told_apart:
        counts = ", ".join(f"{whole:,} in {side.name.lower()}" for side, whole in zip(sides, wholes, strict=True))
        return f'{title}<p class="muted">The source does not tell kinds of questions apart: {counts}.</p>\n'
    rows = [
        row(text(kind, 80), [counted(*cell) for cell in zip(sides, numbers, wholes, strict=True)])
        for kind, numbers in told_apart
    ]
    caption = "A conversation may ask several; shares are of the questions of a set"
    return f"{title}{table(caption, 'Kind', sides, rows)}"
