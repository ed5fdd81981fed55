"""Stored pictures as HTML: samples with their conversations, and pairs that look alike."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from llava_pipeline.data.report import survey
from llava_pipeline.data.report.facts import Side
from llava_pipeline.data.report.markup import attribute, text

TINY = 160  # pixels of a side up to which a picture is enlarged without smoothing


def sample_section(sides: Sequence[Side]) -> str:
    """Kept rows of both sides."""
    parts = ["<h2>Sample conversations</h2>\n<p>Spread evenly over each set, in its order.</p>\n"]
    for side in sides:
        cards = "".join(map(_sample, survey.samples(side.snapshot)))
        shown = f'<div class="cards">\n{cards}</div>\n' if cards else '<p class="muted">No row was kept.</p>\n'
        parts.append(f'<h3 class="{side.key}">{side.name}</h3>\n{shown}')
    return "".join(parts)


def pair_section(sides: Sequence[Side]) -> str:
    """Near duplicates of both sides."""
    parts = [
        "<h2>Pictures that look alike</h2>\n"
        "<p>Different pixels, the same look: re-encoded, resized or mirrored copies, or pictures hard to tell apart. "
        "The one that came first is on the left.</p>\n"
    ]
    for side in sides:
        total, found = side.snapshot.num_near_duplicates, survey.pairs(side.snapshot)
        told = f"{len(found)} of {total:,}, spread evenly" if total > len(found) else f"All {total:,}"
        cards = "".join(
            f'<div class="card pair">{_twin(first, "earlier")}{_twin(second, "later")}</div>\n'
            for first, second in found
        )
        shown = f'<p class="muted">{told}.</p>\n<div class="pairs">\n{cards}</div>\n'
        none = '<p class="muted">No picture looks like an earlier one of this set.</p>\n'
        parts.append(f'<h3 class="{side.key}">{side.name}</h3>\n{shown if found else none}')
    return "".join(parts)


def _sample(sample: survey.Sample) -> str:
    rounds = "".join(
        f"<dt>{text(question, more=' said')}{_kind(kind)}</dt><dd>{text(answer, more=' said')}</dd>"
        for question, answer, kind in sample.rounds
    )
    if more := sample.num_rounds - len(sample.rounds):
        rounds += f"<dt>and {more:,} more round{'s' if more > 1 else ''}</dt>"
    picture = sample.picture
    shown = "Text alone, no picture" if picture is None else _image(picture, f"Picture of {sample.id}")
    size = "" if picture is None else f"{_size(picture)}, "
    return (
        f'<article class="card"><div class="frame">{shown}</div><div class="body"><dl>{rounds}</dl>'
        f'<p class="foot">{text(sample.id, 80)}<br>{size}{sample.num_tokens:,} tokens, '
        f"{sample.num_supervised:,} learned</p></div></article>\n"
    )


def _kind(kind: str) -> str:
    return "" if kind == "all" else f' <small class="kind">{text(kind, 40)}</small>'


def _twin(picture: survey.Picture, which: str) -> str:
    image = _image(picture, f"The {which} of two pictures that look alike, number {picture.number}")
    return (
        f'<figure><div class="frame">{image}</div><figcaption>number {picture.number:,}<br>{_size(picture)}<br>'
        f'<span class="digest">{text(picture.sha256[:12])}</span></figcaption></figure>'
    )


def _size(picture: survey.Picture) -> str:
    return f"{picture.width:,} by {picture.height:,} pixels"


def _image(picture: survey.Picture, alt: str) -> str:
    if not picture.jpeg:
        return "Cannot be decoded"
    tiny = ' class="tiny"' if max(picture.width, picture.height) <= TINY else ""
    data = base64.b64encode(picture.jpeg).decode("ascii")
    return f'<img{tiny} src="data:image/jpeg;base64,{data}" alt="{attribute(alt, 120)}">'
