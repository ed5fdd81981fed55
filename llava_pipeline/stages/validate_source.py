"""Validation alone: any source, checked as a run of a profile would check it, with the report as a page."""

from __future__ import annotations

from pathlib import Path

from llava_pipeline.contracts import ValidatedData
from llava_pipeline.data import report
from llava_pipeline.data.sources.named import source_named
from llava_pipeline.spec import RunSpec, ScenesSource, WorkersSpec
from llava_pipeline.stages.assemble import assemble_and_freeze
from llava_pipeline.stages.fetch import fetch_backbones
from llava_pipeline.stages.last_place import where_the_last_run_stopped
from llava_pipeline.stages.validate import EVERYTHING, snapshots
from llava_pipeline.store import home, write_text

OF_AN_ENDLESS_SOURCE = 1000
HELD_OUT_SHARE = 10  # one held-out row for so many to train on, where a limit is given


def validate_source(
    spec: RunSpec, name: str, images: str | None, limit: int | None, workers: int, page: Path | None
) -> tuple[ValidatedData, Path]:
    """Both snapshots of the source that ``name`` means, and where their report lies.

    However many rows are refused, the report is made; whether that is too many is for the caller to say.

    Raises:
        NotFound, SpecError: no such source.
        SourceUnavailable, NothingToLearn: see ``stages.validate``.
    """
    source = source_named(name, images)
    if limit is None and isinstance(source, ScenesSource):
        limit = OF_AN_ENDLESS_SOURCE
    data = spec.data.model_copy(update={
        "source": source, "max_samples": limit or EVERYTHING, "max_rejected_share": 1.0,
        "workers": WorkersSpec(kind="processes" if workers > 1 else "threads", num=workers),
    })  # fmt: skip
    model = assemble_and_freeze(fetch_backbones(spec.backbones), spec.model)
    num_held_out = EVERYTHING if limit is None else max(1, limit // HELD_OUT_SHARE)
    found = snapshots(model, data, num_held_out, where_the_last_run_stopped)
    page = page or home() / "reports" / f"data-{found.train.rows.digest[:12]}.html"
    write_text(page, report.page(found))
    return found, page
