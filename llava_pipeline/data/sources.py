"""Where rows come from. Every source streams rows in the vsft schema; images are bytes, not yet decoded."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import Any, Literal

from llava_pipeline.backbones.wheel import fetch_wheel
from llava_pipeline.data import scenes
from llava_pipeline.data.record import Row
from llava_pipeline.data.revisions import remember
from llava_pipeline.errors import BackboneUnavailable, LlavaPipelineError, NotFound, SourceUnavailable
from llava_pipeline.spec import EasyVqaSource, HubSource, ScenesSource, Source, shards_in
from llava_pipeline.store import home

Split = Literal["train", "test"]
WHEEL_SECONDS = 60.0  # how long a package index out of reach is asked again
HUB_SECONDS = 10.0  # a hub that does not answer for so long is not there


def stream(source: Source, split: Split) -> tuple[str, Iterator[Row]]:
    """The source's name with its resolved revision, and its rows.

    Raises:
        SourceUnavailable: it cannot be reached or read.
        NotFound: what was named is not there: a folder, a repository, a commit.
        RevisionMoved: a branch leads to another commit than before.
    """
    if isinstance(source, ScenesSource):
        return f"scenes/{source.seed}/{split}", stream_scenes(source, split)
    if isinstance(source, EasyVqaSource):
        return f"{source.requirement}/{split}", stream_easy_vqa(source, split)
    return open_hub(source, split)


def stream_scenes(source: ScenesSource, split: Split) -> Iterator[Row]:
    """Scenes without end, their pictures as PNG."""
    for row in scenes.records(source.seed, split):
        buffer = io.BytesIO()
        row["images"][0].save(buffer, "PNG", compress_level=1)
        yield {**row, "images": [{"bytes": buffer.getvalue()}]}


KIND_OF_ANSWER = {"yes": "yes/no", "no": "yes/no", "circle": "shape", "rectangle": "shape", "triangle": "shape"}


def stream_easy_vqa(source: EasyVqaSource, split: Split) -> Iterator[Row]:
    """easy-VQA: conversations of one picture's questions to train on, single questions to be asked."""
    try:
        path = fetch_wheel(source.requirement, source.wheel_sha256, WHEEL_SECONDS)
    except BackboneUnavailable as error:
        raise SourceUnavailable(str(error)) from error
    with zipfile.ZipFile(path) as wheel:
        folder = f"easy_vqa/data/{split}"
        if f"{folder}/questions.json" not in wheel.namelist():
            raise NotFound(f"{source.requirement} holds no {folder}/questions.json; correct data.source.requirement")
        questions: dict[int, list[tuple[str, str]]] = {}
        for text, answer, image in json.loads(wheel.read(f"{folder}/questions.json")):
            questions.setdefault(image, []).append((text, answer))
        per_row = source.questions_per_image if split == "train" else 1
        for image, asked in sorted(questions.items()):
            data = wheel.read(f"{folder}/images/{image}.png")
            for start in range(0, len(asked), per_row):
                messages: list[dict[str, Any]] = []
                for text, answer in asked[start : start + per_row]:
                    messages += [scenes.turn("user", text, not messages), scenes.turn("assistant", answer)]
                kinds = [KIND_OF_ANSWER.get(answer, "color") for _, answer in asked[start : start + per_row]]
                row_id = f"easy-vqa/{split}/{image}/{start}"
                yield {"id": row_id, "messages": messages, "images": [{"bytes": data}], "kinds": kinds}


def open_hub(source: HubSource, split: Split) -> tuple[str, Iterator[Row]]:
    """A hub data set, or local Parquet shards of one, streamed by ``datasets``."""
    from datasets import Image, List, load_dataset

    files: list[str] = []
    if source.path is not None:
        folder = Path(source.path).expanduser()
        files = [
            escape(str(path)) for path in shards_in(folder) if re.fullmatch(rf"{split}([-.].*|_?\d.*)?", path.stem)
        ]
        if not files:
            raise NotFound(f"no {split}-*.parquet in {source.path} or in its folder data; check data.source.path")
    options = {"split": split, "streaming": True, "cache_dir": str(home() / "datasets")}
    try:
        if files:
            origin = f"folder:{folder.absolute().name}/{split}"
            dataset = load_dataset("parquet", data_files={split: files}, **options)
        else:
            revision = resolve(source)
            origin = f"hub:{source.repo_id}@{revision}/{split}"
            dataset = load_dataset(source.repo_id, revision=revision, **options)
        dataset = dataset.cast_column("images", List(Image(decode=False)))
    except LlavaPipelineError:
        raise
    except Exception as error:  # of httpx, huggingface_hub, fsspec, pyarrow or datasets, and no two share a base
        raise SourceUnavailable(_remedy(source, error)) from error
    return origin, _told(source, ({"id": f"{origin}/{n}", **row} for n, row in enumerate(dataset)))


def resolve(source: HubSource) -> str:
    """The commit of a hub data set. A branch that led to another one before is refused.

    Raises:
        NotFound: no such repository or revision.
        RevisionMoved: the branch leads to another commit than before.
    """
    from huggingface_hub import HfApi, errors

    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        commit = hub.dataset_info(source.repo_id, revision=source.revision, timeout=HUB_SECONDS).sha
    except errors.GatedRepoError:  # a kind of the next, but one that is there
        raise
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NotFound(
            f"the hub has no public data set {source.repo_id} at {source.revision}; "
            "correct data.source.repo_id or data.source.revision, or set HF_TOKEN"
        ) from error
    if commit != source.revision:
        remember(source.repo_id, source.revision, str(commit))
    return str(commit)


def _told(source: HubSource, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows; what breaks while they are read is told as what breaks when they are opened."""
    try:
        yield from rows
    except Exception as error:
        raise SourceUnavailable(_remedy(source, error)) from error


def _remedy(source: HubSource, error: Exception) -> str:
    """What was found, in the library's first words, and what to do about it."""
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    if source.path is not None:
        return f"cannot read the Parquet shards in {source.path} ({words}); check data.source.path"
    return (
        f"cannot read the data set {source.repo_id} ({words}); connect to the hub, or read local "
        "Parquet shards with --set data.source.path=FOLDER, or train on --set data.source=scenes"
    )
