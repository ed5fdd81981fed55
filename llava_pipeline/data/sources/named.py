"""The source a person means by one word: a kind, a file, a folder, or a data set of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from llava_pipeline.errors import NotFound, SpecError
from llava_pipeline.spec import (
    EasyVqaSource,
    FolderSource,
    HubSource,
    JsonlSource,
    LlavaJsonSource,
    ParquetSource,
    ScenesSource,
    Source,
    WebDatasetSource,
)

_HUB = re.compile(r"(?P<repo_id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
WITH_IMAGES = (JsonlSource, LlavaJsonSource)


def source_named(name: str, images: str | None = None) -> Source:
    """``scenes``, ``easy-vqa``, a path (its kind is told from what is there), or ``owner/name[@revision]``.

    ``images`` is the folder that paths in the rows start from.

    Raises:
        NotFound: there is no such file, and it is not the name of anything else.
        SpecError: a file of an unknown kind, or ``images`` for rows that hold their pictures.
    """
    source = _source(name)
    if images is None:
        return source
    if not isinstance(source, WITH_IMAGES):
        raise SpecError(f"{name} is read as {source.kind}, whose rows bring their pictures along; leave out --images")
    if not Path(images).is_dir():
        raise NotFound(f"there is no folder {images}; check --images")
    return source.model_copy(update={"images": images})


def _source(name: str) -> Source:
    if name == "scenes":
        return ScenesSource()
    if name == "easy-vqa":
        return EasyVqaSource()
    path = Path(name).expanduser()
    if path.is_dir():
        return _of_folder(path)
    if path.exists():
        return _of_file(path)
    if (match := _HUB.fullmatch(name)) and not name.startswith("."):
        return HubSource(repo_id=match["repo_id"], revision=match["revision"] or "main")
    raise NotFound(f"there is no file or folder {name}; give a path, owner/name of a hub data set, scenes or easy-vqa")


def _of_file(path: Path) -> Source:
    match path.suffix.lower():
        case ".parquet":
            return ParquetSource(path=str(path))
        case ".jsonl" | ".ndjson":
            return JsonlSource(path=str(path))
        case ".json" if _begins_with_an_object(path):  # POPE's files are JSON lines by another name
            return JsonlSource(path=str(path))
        case ".json":
            return LlavaJsonSource(path=str(path))
        case ".tar":
            return WebDatasetSource(path=str(path))
    raise SpecError(f"{path.name} is of an unknown kind; known are .parquet, .jsonl, .json (LLaVA) and .tar")


def _begins_with_an_object(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def _of_folder(path: Path) -> Source:
    for pattern, kind in (
        ("*.parquet", ParquetSource), ("data/*.parquet", ParquetSource), ("*.jsonl", JsonlSource),
        ("*.tar", WebDatasetSource),
    ):  # fmt: skip
        if any(path.glob(pattern)):
            return kind(path=str(path))
    return FolderSource(path=str(path))
