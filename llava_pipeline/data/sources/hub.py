"""A data set of the hub, streamed by ``datasets`` at one commit.

A shard is a row group of a Parquet file, so a worker downloads the rows of its piece and no others; a piece is named
``file#row group``, by which a worker finds it without reading the footers of all files. Of other formats a shard is
whatever ``datasets`` makes one, of a length that nobody knows beforehand.

What does not come is waited for in ``patient``. What comes and cannot be read is fetched anew, a few times; then the
rows of that row group are refused, each, and reading goes on behind it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava_pipeline.contracts import Cursor, Piece
from llava_pipeline.data.record import Row
from llava_pipeline.data.revisions import remember
from llava_pipeline.data.sources.reader import PIECE_ROWS, Broken
from llava_pipeline.errors import LlavaPipelineError, NotFound, SourceUnavailable
from llava_pipeline.spec import HubSource, Split
from llava_pipeline.store import home

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)
# Every piece downloads its row group, so one is cut only where it is far too long to be checked at once.
MOST_ROWS = 8 * PIECE_ROWS
TRIES = 3  # of bytes that came and cannot be read
# fsspec reads as much again behind every read, 5 MiB by default; Arrow already asks for whole columns at a time.
READ_AHEAD = 64 * 1024
CARDS = ["README.md", ".huggingface.yaml", "dataset_infos.json"]  # they decide which files are read, and as what
NEEDED = {"messages", "images", "image"}  # a file that lacks another column has rows without it
UNREADABLE, DRIFT = "shard_unreadable", "schema_drift"
Result = TypeVar("Result")
_lock = threading.Lock()
_opened: dict[tuple[str, str, str, str], _Opened] = {}


class HubReader:
    """One split of a hub data set: ``Reader``."""

    def __init__(self, source: HubSource, split: Split, patience_seconds: float):
        """Resolve the branch and open the split.

        Raises:
            SourceUnavailable: the hub is out of reach, refuses, or HF_HUB_OFFLINE is set.
            NotFound: no such repository, revision or split.
            RevisionMoved: the branch leads to another commit than before.
        """
        from llava_pipeline.data.sources.patient import be_patient

        be_patient(source.repo_id, patience_seconds)
        self._patience_seconds = patience_seconds
        self._commit = resolve(source)
        self.source = source.model_copy(update={"revision": self._commit})
        self.has_split = source.test_split is not None
        self._split = source.test_split if split == "test" and source.test_split is not None else source.train_split
        self.origin = f"hub:{source.repo_id}@{self._commit}/{self._split}"
        self._data = _open(source.repo_id, self._commit, self._split)

    def pieces(self, start: Cursor) -> Iterator[Piece]:
        """Row groups from a place on."""
        for shard, (name, num_rows) in enumerate(self._data.shards()):
            if shard < start.shard:
                continue
            row = start.row if shard == start.shard else 0
            if num_rows is None:
                yield Piece(shard=shard, name=name, start=row, stop=None)
                continue
            while row < num_rows:
                stop = min(num_rows, (row // MOST_ROWS + 1) * MOST_ROWS)
                yield Piece(shard=shard, name=name, start=row, stop=stop)
                row = stop

    def rows(self, piece: Piece) -> Iterator[Row | Broken]:
        """The rows of a piece, each once and in order, whatever happens on the way.

        Raises:
            SourceUnavailable: patience has ended.
        """
        from huggingface_hub import errors

        from llava_pipeline.data.sources.patient import FIRST_PAUSE, HTTPError, Patience, first_words, remedy

        patience = Patience(self.source.repo_id, self._patience_seconds)
        row, failures = piece.start, 0
        while True:
            try:
                for content in itertools.islice(self._data.rows(piece), row, piece.stop):
                    row, failures = row + 1, 0
                    patience.progress()
                    yield self._named(content, piece, row - 1)
                if piece.stop is None or row == piece.stop:
                    return
                reason, words = UNREADABLE, f"it ends after {row} rows"
            except (LlavaPipelineError, MemoryError):
                raise
            except errors.HfHubHTTPError as error:
                raise SourceUnavailable(remedy(self.source.repo_id, first_words(error))) from error
            except (HTTPError, ConnectionError) as error:  # in the body of a file that is read as a stream
                patience.wait(piece.name, first_words(error))
                continue
            except _Drift as error:
                reason, words, failures = DRIFT, str(error), TRIES
            except Exception as error:  # of pyarrow or datasets or a format's own library, and no two share a base
                reason, words = UNREADABLE, first_words(error)
            failures += 1
            if failures < TRIES:
                logger.warning("%s of %s cannot be read (%s); fetching it anew", piece.name, self.origin, words)
                time.sleep(FIRST_PAUSE * failures)
                continue
            yield from self._refused(piece, row, reason, words)
            return

    def _refused(self, piece: Piece, row: int, reason: str, words: str) -> Iterator[Broken]:
        """The rest of a piece, each row with the reason; as one where nobody knows how many they are."""
        if reason == UNREADABLE and self._data.is_sound(piece):
            reason = DRIFT  # there is nothing wrong with it but that datasets does not make these columns of it
        logger.warning("%s of %s is refused from row %d on: %s", piece.name, self.origin, row, words)
        for number in range(row, row + 1 if piece.stop is None else piece.stop):
            yield Broken(reason, f"{piece.name}: {words}", id=self._id(piece, number))

    def num_rows(self) -> int | None:
        """Rows of all row groups; of other formats what the card says, if it does."""
        counts = [count for _, count in self._data.shards()]
        return self._data.num_rows if None in counts else sum(count or 0 for count in counts)

    def num_before(self, place: Cursor) -> int | None:
        """Rows of the row groups before a place, and those before it in its own."""
        counts = [count for _, count in itertools.islice(self._data.shards(), place.shard)]
        return None if None in counts else sum(count or 0 for count in counts) + place.row

    def behind(self, shard: int) -> str:
        """Empty: the commit fixes every file."""
        return ""

    def _id(self, piece: Piece, number: int) -> str:
        return f"{self.origin}/{piece.name}/{number}"

    def _named(self, content: Row, piece: Piece, number: int) -> Row:
        """A row with a name, and with a list of pictures where its data set has one picture a row."""
        row = dict(content)
        if row.get("id") is None:
            row["id"] = self._id(piece, number)
        if "image" in row and "images" not in row:
            row["images"] = [] if row["image"] is None else [row["image"]]
            del row["image"]
        return row


def resolve(source: HubSource) -> str:
    """The commit of a hub data set. A branch that led to another one before is refused.

    Raises:
        NotFound: no such repository or revision.
        RevisionMoved: the branch leads to another commit than before.
        SourceUnavailable: the hub is out of reach or refuses.
    """
    from huggingface_hub import HfApi, errors

    from llava_pipeline.data.sources.patient import first_words, remedy

    if len(source.revision) == 40 and set(source.revision) <= set("0123456789abcdef"):
        return source.revision  # whether it is there is seen when it is opened
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        commit = str(hub.dataset_info(source.repo_id, revision=source.revision).sha)
    except errors.GatedRepoError as error:  # a kind of the next, but one that is there
        raise SourceUnavailable(_gated(source.repo_id)) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NotFound(_missing(source.repo_id, source.revision)) from error
    except LlavaPipelineError:
        raise
    except Exception as error:  # a refusal, or an answer that is none
        raise SourceUnavailable(remedy(source.repo_id, first_words(error))) from error
    remember(source.repo_id, source.revision, commit)
    return commit


class _Drift(Exception):
    """A file whose columns are not the data set's."""


@dataclass(frozen=True, slots=True)
class _Footer:
    """What the end of a Parquet file says."""

    num_rows: tuple[int, ...]  # of each row group
    schema: pa.Schema


@dataclass
class _Opened:
    """A split at a commit, for all threads of a process."""

    repo_id: str
    dataset: Any
    num_rows: int | None  # as the card says
    files: dict[str, str] | None  # address by name, in order; None: not Parquet
    footers: dict[str, _Footer | None] = field(default_factory=dict)
    _groups: dict[str, Any] = field(default_factory=dict)

    def shards(self) -> Iterator[tuple[str, int | None]]:
        """Name and number of rows of every shard. A file without a readable end counts as one row, to be refused."""
        if self.files is None:
            yield from ((f"shard {number}", None) for number in range(self.dataset.num_shards))
            return
        with ThreadPoolExecutor(8) as pool:  # a round trip each, for data sets of hundreds of files
            footers = list(pool.map(self.footer, self.files))
        for name, footer in zip(self.files, footers, strict=True):
            if footer is None:
                yield f"{name}#?", 1
            else:
                yield from ((f"{name}#{group}", count) for group, count in enumerate(footer.num_rows))

    def footer(self, name: str) -> _Footer | None:
        """The end of a file; None where it stays unreadable."""
        if self.files is not None and name not in self.footers:
            self.footers[name] = _read_footer(self.repo_id, self.files[name])
        return self.footers.get(name)

    def rows(self, piece: Piece) -> Iterator[Row]:
        """The rows of a piece's shard, from its first.

        Raises:
            _Drift: the columns of its file do not fit.
            Exception: whatever the libraries make of what they cannot read.
        """
        if self.files is None:
            yield from _undecoded(self.dataset.shard(num_shards=self.dataset.num_shards, index=piece.shard))
            return
        name, _, group = piece.name.rpartition("#")
        if group == "?" or (footer := self.footer(name)) is None:
            raise ValueError("the end of the file, which says what it holds, cannot be read")
        found, columns = set(footer.schema.names), set(self.dataset.features)
        if found - columns or (columns - found) & NEEDED:
            raise _Drift(f"its columns are {', '.join(sorted(found))}, not {', '.join(sorted(columns))}")
        groups = self._row_groups(name, len(footer.num_rows))
        yield from _undecoded(groups.shard(num_shards=groups.num_shards, index=int(group)))

    def _row_groups(self, name: str, num_groups: int) -> Any:
        """One file, a shard per row group."""
        if name not in self._groups:
            files = list(self.files or ())
            groups = self.dataset.shard(num_shards=len(files), index=files.index(name)).reshard()
            if groups.num_shards != num_groups:
                raise ValueError(f"the file has {groups.num_shards} row groups now, where it had {num_groups}")
            self._groups[name] = groups
        return self._groups[name]

    def is_sound(self, piece: Piece) -> bool:
        """Whether Arrow reads a row group, so that it is not corrupt."""
        name, _, group = piece.name.rpartition("#")
        if self.files is None or group == "?":
            return False
        try:
            with _parquet(self.files[name]) as file:
                file.read_row_group(int(group))
        except (OSError, ValueError):
            return False
        return True


def _undecoded(dataset: Any) -> Iterator[Row]:
    """Rows whose pictures are still bytes: what does not decode is the image gate's to say."""
    yield from dataset.decode(False) if dataset.features else dataset


def _open(repo_id: str, commit: str, split: str) -> _Opened:
    """The split, opened once per process."""
    import datasets

    key = (datasets.config.HF_ENDPOINT, repo_id, commit, split)
    with _lock:
        if key not in _opened:
            _opened[key] = _load(repo_id, commit, split)
        return _opened[key]


def _load(repo_id: str, commit: str, split: str) -> _Opened:
    from llava_pipeline.data.sources.patient import first_words, remedy

    try:
        return _again(repo_id, repo_id, lambda: _stream(repo_id, commit, split))
    except LlavaPipelineError:
        raise
    except FileNotFoundError as error:  # DatasetNotFoundError and its like
        if "gated" in str(error):
            raise SourceUnavailable(_gated(repo_id)) from error
        raise NotFound(f"{_missing(repo_id, commit)} ({first_words(error)})") from error
    except Exception as error:
        raise SourceUnavailable(remedy(repo_id, first_words(error))) from error


def _stream(repo_id: str, commit: str, split: str) -> _Opened:
    """What ``load_dataset(..., streaming=True)`` does, with a look at the files in between."""
    import datasets
    from datasets import Features, load_dataset_builder

    # datasets reads on from a body that broke as if it had ended; read from its start again, it loses nothing.
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
    _check_cards(repo_id, commit)
    builder = load_dataset_builder(
        repo_id, revision=commit, cache_dir=str(home() / "datasets"),
        storage_options={"hf": {"block_size": READ_AHEAD}},
    )  # fmt: skip
    splits = builder.config.data_files or {}
    if split not in splits:
        raise NotFound(
            f"the data set {repo_id} has no split {split}, only {', '.join(map(str, splits))}; "
            "correct data.source.train_split or data.source.test_split (null holds out a share of the pictures)"
        )
    told = (builder.info.splits or {}).get(split)
    if builder.config.__class__.__name__ != "ParquetConfig":
        return _Opened(repo_id, builder.as_streaming_dataset(split=split), told and told.num_examples, None)
    files = {url.partition(f"@{commit}/")[2] or url: url for url in splits[split]}
    opened = _Opened(repo_id, None, told and told.num_examples, files)
    if builder.info.features is None:
        # datasets takes the first file's, and gives up where that one is damaged.
        footer = next(filter(None, map(opened.footer, files)), None)
        if footer is None:
            raise SourceUnavailable(f"no Parquet file of the split {split} of {repo_id}@{commit} can be read")
        builder.info.features = Features.from_arrow_schema(footer.schema)
    opened.dataset = builder.as_streaming_dataset(split=split)
    return opened


def _check_cards(repo_id: str, commit: str) -> None:
    """Fetch the files that say how a data set is read, and forget them where their content is not git's.

    ``datasets`` reads them from the hub's cache, which takes any bytes of the right length and keeps them.
    """
    import datasets
    from huggingface_hub import HfApi, hf_hub_download

    endpoint = datasets.config.HF_ENDPOINT
    try:
        cards: list[Any] = HfApi(endpoint=endpoint).get_paths_info(repo_id, CARDS, revision=commit, repo_type="dataset")
    except OSError:  # of a status: load_dataset_builder tells it better
        return
    for card in cards:
        path = Path(
            hf_hub_download(repo_id, card.path, revision=commit, repo_type="dataset", endpoint=endpoint)
        )  # fmt: skip
        content = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        if card.lfs is None and found != card.blob_id:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise ValueError(f"{card.path} came as {found}, and is {card.blob_id}")


def _read_footer(repo_id: str, url: str) -> _Footer | None:
    """Numbers of rows and columns of a Parquet file; None where they cannot be read."""
    from llava_pipeline.data.sources.patient import first_words

    def read() -> _Footer:
        with _parquet(url) as file:
            counts = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            return _Footer(tuple(counts), file.schema_arrow)

    try:
        return _again(repo_id, url, read)
    except LlavaPipelineError:
        raise
    except Exception as error:  # of pyarrow, which has many
        logger.warning("%s is refused as a whole: %s", url, first_words(error))
        return None


@contextlib.contextmanager
def _parquet(url: str) -> Iterator[Any]:
    """A Parquet file on the hub."""
    import datasets
    import pyarrow.parquet as pq
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem(endpoint=datasets.config.HF_ENDPOINT, block_size=READ_AHEAD)
    with hub.open(url) as file:
        yield pq.ParquetFile(file)


def _again(repo_id: str, what: str, call: Callable[[], Result]) -> Result:
    """The result, fetched anew where what came cannot be read. What the hub refuses is final."""
    from huggingface_hub import errors

    from llava_pipeline.data.sources.patient import FIRST_PAUSE, first_words, remedy

    failures = 0
    while True:
        try:
            return call()
        except (LlavaPipelineError, MemoryError, FileNotFoundError):
            raise
        except errors.HfHubHTTPError as error:
            raise SourceUnavailable(remedy(repo_id, first_words(error))) from error
        except Exception as error:
            failures += 1
            if failures == TRIES:
                raise
            logger.warning("%s cannot be read (%s); fetching it anew", what, first_words(error))
            time.sleep(FIRST_PAUSE * failures)


def _gated(repo_id: str) -> str:
    return (
        f"the data set {repo_id} is gated; accept its terms on its page at the hub and set HF_TOKEN, "
        "or train on --set data.source=scenes"
    )


def _missing(repo_id: str, revision: str) -> str:
    return (
        f"the hub has no public data set {repo_id} at {revision}; "
        "correct data.source.repo_id or data.source.revision, or set HF_TOKEN"
    )
