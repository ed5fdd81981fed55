"""Stage 3: the stream read piece by piece, every row checked, the good ones kept and every refusal counted.

Pieces are checked by whoever is given them (here, threads or processes; the flow gives them to Prefect's workers) and
taken in order, so the snapshot does not depend on who checked what.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from typing import Any, Protocol

from llava_pipeline.contracts import AssembledModel, CheckedPiece, Cursor, Piece, Snapshot, ValidatedData
from llava_pipeline.data import parts
from llava_pipeline.data.fingerprint import SeenPictures
from llava_pipeline.data.snapshot import leading_reasons, take
from llava_pipeline.data.sources import open_source
from llava_pipeline.data.sources.reader import Reader, stamp_of
from llava_pipeline.errors import DamagedArtifact, NothingToLearn, SpecError, WorkerDied
from llava_pipeline.model.processor import Processor
from llava_pipeline.model.read_processor import processor_of
from llava_pipeline.progress import bar
from llava_pipeline.spec import DataSpec, Source, Split, WorkersSpec

log = logging.getLogger(__name__)
TIMES_A_PART_IS_MADE = 3
EVERYTHING = 1 << 50  # more rows than any source has


class Pending(Protocol):
    """A piece that is being checked."""

    def result(self) -> CheckedPiece:
        """Wait for it; raises what went wrong."""
        ...


Submit = Callable[[AssembledModel, DataSpec, Split, Piece], Pending]
LastPlace = Callable[[AssembledModel, str], Cursor]  # of a model and an origin, where an increment begins


def validate_stream(
    model: AssembledModel,
    spec: DataSpec,
    num_held_out: int,
    last_place: LastPlace,
    submit: Submit | None = None,
) -> ValidatedData:
    """A snapshot to train on, and one that is held out; the first shows no picture of the second.

    ``last_place`` is asked where the last run stopped if the spec asks for an increment.

    Raises:
        SourceUnavailable: out of reach for longer than the spec's patience; what was checked is kept for the next run.
        TooManyRejected, NothingToLearn, NothingNew: see ``data.snapshot.take``; no row is held out.
    """
    data = snapshots(model, spec, num_held_out, last_place, submit)
    if data.held_out.num_kept == 0:
        raise NothingToLearn(
            f"no picture of {data.held_out.origin} falls into the share that is held out; raise "
            f"data.held_out_share={spec.held_out_share}, or give more pictures"
        )
    return data


def snapshots(
    model: AssembledModel, spec: DataSpec, num_held_out: int, last_place: LastPlace, submit: Submit | None = None
) -> ValidatedData:
    """As ``validate_stream``; where the source has no split of its own, perhaps no row is held out."""
    _reader_of.cache_clear()  # a file may have changed since this process opened it
    test, train = (open_source(spec.source, split, spec.patience_seconds) for split in ("test", "train"))
    for reader in (test, train):
        parts.forget_if_changed(parts.folder_for(reader, model, spec), stamp_of(reader.source))
    start = last_place(model, train.origin) if spec.increment else Cursor()
    with workers(spec.workers) if submit is None else nullcontext(submit) as submit:
        held_out, pictures = snapshot(test, "test", model, spec, num_held_out, Cursor(), None, submit)
        kept, _ = snapshot(train, "train", model, spec, spec.max_samples, start, pictures, submit)
    for reader in (test, train):
        shutil.rmtree(parts.folder_for(reader, model, spec), ignore_errors=True)
    return ValidatedData(train=kept, held_out=held_out)


def snapshot(
    reader: Reader,
    split: Split,
    model: AssembledModel,
    spec: DataSpec,
    wanted: int,
    start: Cursor,
    held_out: SeenPictures | None,
    submit: Submit,
) -> tuple[Snapshot, SeenPictures]:
    """Up to ``wanted`` good rows of a split, and their pictures."""
    pinned = spec.model_copy(update={"source": reader.source})
    to_read = wanted if reader.has_split else _rows_that_hold(wanted, split, spec.held_out_share)
    with bar(f"validate {reader.origin}", wanted if wanted < EVERYTHING else reader.num_rows()) as advance:
        hand_out = functools.partial(submit, model, pinned, split)
        rows = checked_rows(reader, start, to_read, hand_out, spec.workers.num)
        kept, pictures = take(reader, split, rows, spec, wanted, start, held_out, advance)
    left = "" if kept.num_left is None else f", {kept.num_left} left"
    refused = leading_reasons(kept.rejected)
    log.info("%s: read %d, kept %d, refused %s%s", reader.origin, kept.num_read, kept.num_kept, refused, left)
    return kept, pictures


def _rows_that_hold(wanted: int, split: Split, held_out_share: float) -> int:
    """How many rows of both splits hold about so many of one."""
    return math.ceil(wanted / (held_out_share if split == "test" else 1 - held_out_share))


def checked_rows(
    reader: Reader, start: Cursor, wanted: int, submit: Callable[[Piece], Pending], num_workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows from a place on, as (shard, row), in order, while the next pieces are being checked.

    What goes beyond ``wanted`` rows is handed out a piece at a time, and only when it is asked for.
    """
    pieces = planned(reader, start, wanted)
    waiting: deque[tuple[Piece, Pending]] = deque()
    num_handed_out = 0
    try:
        while True:
            while not waiting or (len(waiting) < 2 * num_workers and num_handed_out < wanted):
                if (piece := next(pieces, None)) is None:
                    break
                waiting.append((piece, submit(piece)))
                num_handed_out += piece.num_rows or 0
            if not waiting:
                return
            piece, pending = waiting.popleft()
            yield from ((piece.shard, row) for row in _rows_of(piece, pending, submit))
    finally:
        for _, pending in waiting:
            if isinstance(pending, Future):
                pending.cancel()


def planned(reader: Reader, start: Cursor, wanted: int) -> Iterator[Piece]:
    """The reader's pieces, cut once where the wanted rows would be complete if none were refused."""
    count = 0
    for piece in reader.pieces(start):
        if piece.num_rows is not None and count < wanted < count + piece.num_rows:
            cut = piece.start + wanted - count
            yield piece.model_copy(update={"stop": cut})
            yield from reader.pieces(Cursor(shard=piece.shard, row=cut, behind=reader.behind(piece.shard)))
            return
        count += piece.num_rows or 0
        yield piece


def _rows_of(piece: Piece, pending: Pending, submit: Callable[[Piece], Pending]) -> Iterator[dict[str, Any]]:
    """A piece's rows; a part that was damaged on disk is made anew, and read on behind what was taken."""
    taken = 0
    for _ in range(TIMES_A_PART_IS_MADE):
        try:
            for row in itertools.islice(parts.read(pending.result()), taken, None):
                yield row
                taken += 1
            return
        except parts.PartDamaged as error:
            log.warning("%s; its rows are checked again", error)
            pending = submit(piece)
        except BrokenExecutor as error:
            raise WorkerDied(
                f"a process that checked {piece.name} from row {piece.start} on was killed, perhaps for its memory; "
                "run again (what is checked is kept), with fewer workers if it happens again"
            ) from error
    raise DamagedArtifact(f"{piece.name}, row {piece.start} on: what is written is not what is read; check the disk")


# --------------------------------------------------------------------------------------------- who checks


def check_piece(model: AssembledModel, spec: DataSpec, split: Split, piece: Piece) -> CheckedPiece:
    """Check one piece, in whatever process or machine this is; the store is shared."""
    reader = reader_of(spec.source, split, spec.patience_seconds)
    return parts.check(reader, piece, cached_processor(model), spec, parts.folder_for(reader, model, spec))


_opening = threading.Lock()


def reader_of(source: Source, split: Split, patience_seconds: float) -> Reader:
    """A reader, opened once per process, and again when the file or folder it reads has changed."""
    path = getattr(source, "path", None)
    changed = os.stat(path).st_mtime_ns if path is not None and os.path.exists(path) else 0
    with _opening:
        return _reader_of(source, split, patience_seconds, changed)


def cached_processor(model: AssembledModel) -> Processor:
    """The model's processor, loaded once per process."""
    with _opening:
        return _processor_of(model.model_dump_json())


@functools.lru_cache(maxsize=4)
def _reader_of(source: Source, split: Split, patience_seconds: float, changed: int) -> Reader:
    return open_source(source, split, patience_seconds)


@functools.lru_cache(maxsize=2)
def _processor_of(model: str) -> Processor:
    return processor_of(AssembledModel.model_validate_json(model))


class Done:
    """A piece that was checked when it was handed out."""

    def __init__(self, checked: CheckedPiece) -> None:
        self.checked = checked

    def result(self) -> CheckedPiece:
        """The checked piece."""
        return self.checked


@contextmanager
def workers(spec: WorkersSpec) -> Iterator[Submit]:
    """Threads or processes of this machine; with one thread, the caller's own.

    Raises:
        SpecError: the spec asks for a cluster.
    """
    if spec.kind not in ("threads", "processes"):
        raise SpecError(f"data.workers.kind={spec.kind} works in the flow only; use processes here")
    if spec.kind == "threads" and spec.num == 1:
        yield lambda *what: Done(check_piece(*what))
        return
    pool: Executor = ThreadPoolExecutor(spec.num)
    if spec.kind == "processes":
        pool = ProcessPoolExecutor(spec.num, get_context("spawn"))  # a fork would copy locks held by other threads
    try:
        yield lambda *what: pool.submit(check_piece, *what)
    finally:
        pool.shutdown(cancel_futures=True)
