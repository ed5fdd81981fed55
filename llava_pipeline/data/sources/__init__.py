"""Where rows come from: one module per kind of source, all of them a ``Reader``."""

from __future__ import annotations

from llava_pipeline.data.sources.reader import Reader
from llava_pipeline.spec import (
    EasyVqaSource,
    FolderSource,
    HubSource,
    JsonlSource,
    LlavaJsonSource,
    ParquetSource,
    ScenesSource,
    Source,
    Split,
    WebDatasetSource,
)


def open_source(source: Source, split: Split, patience_seconds: float = 60) -> Reader:
    """One split of a source, ready to be read.

    Raises:
        SourceUnavailable: it cannot be reached or read.
        NotFound: what was named is not there: a file, a folder, a repository, a commit.
        RevisionMoved: a branch leads to another commit than before.
    """
    # Imported when asked for: the hub's client alone takes a second.
    match source:
        case ScenesSource():
            from llava_pipeline.data.sources.procedural import ScenesReader

            return ScenesReader(source, split)
        case EasyVqaSource():
            from llava_pipeline.data.sources.easy_vqa import EasyVqaReader

            return EasyVqaReader(source, split, patience_seconds)
        case HubSource():
            from llava_pipeline.data.sources.hub import HubReader

            return HubReader(source, split, patience_seconds)
        case ParquetSource():
            from llava_pipeline.data.sources.parquet import ParquetReader

            return ParquetReader(source, split)
        case JsonlSource():
            from llava_pipeline.data.sources.jsonl import JsonlReader

            return JsonlReader(source, split)
        case LlavaJsonSource():
            from llava_pipeline.data.sources.llava_json import LlavaJsonReader

            return LlavaJsonReader(source, split)
        case WebDatasetSource():
            from llava_pipeline.data.sources.webdataset import WebDatasetReader

            return WebDatasetReader(source, split)
        case FolderSource():
            from llava_pipeline.data.sources.folder import FolderReader

            return FolderReader(source, split)
