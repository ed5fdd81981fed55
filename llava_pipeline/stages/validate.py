"""Stage 3: the stream read once, every row checked, the good ones kept on disk and every refusal counted."""

from __future__ import annotations

import logging

from llava_pipeline.contracts import AssembledModel, Snapshot, ValidatedData
from llava_pipeline.data.snapshot import leading_reasons, take
from llava_pipeline.data.sources import Split, stream
from llava_pipeline.model.assemble import processor_of
from llava_pipeline.model.processor import Processor
from llava_pipeline.progress import bar
from llava_pipeline.spec import DataSpec

log = logging.getLogger(__name__)


def validate_stream(model: AssembledModel, spec: DataSpec, num_held_out: int) -> ValidatedData:
    """A snapshot to train on, and one that is held out."""
    processor = processor_of(model)
    train = snapshot(spec, "train", spec.max_samples, processor)
    held_out = snapshot(spec, "test", num_held_out, processor)
    return ValidatedData(train=train, held_out=held_out)


def snapshot(spec: DataSpec, split: Split, wanted: int, processor: Processor) -> Snapshot:
    """Up to ``wanted`` good rows of a split."""
    origin, rows = stream(spec.source, split)
    with bar(f"validate {origin}", wanted) as advance:
        kept = take(origin, rows, spec, wanted, processor, advance)
    log.info("%s: read %d, kept %d, refused %s", origin, kept.num_read, kept.num_kept, leading_reasons(kept.rejected))
    return kept
