"""What a recorded run tells of its data: the report, the refused rows, the data sets and the place to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_pipeline import store
from llava_pipeline.contracts import Cursor, Evaluation
from llava_pipeline.errors import MissingArtifact
from llava_pipeline.spec import (
    EasyVqaSource,
    FolderSource,
    HubSource,
    JsonlSource,
    LlavaJsonSource,
    ParquetSource,
    RunSpec,
    ScenesSource,
    Source,
    WebDatasetSource,
)
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.reading import last_read
from llava_pipeline.tracking.run import record
from llava_pipeline.tracking.settings import Settings
from tests.tracking.conftest import MakeEvaluation

COMMIT = "ab12" * 10


def reading(evaluation: Evaluation, **changes: Any) -> Evaluation:
    """The same with another account of what was read."""
    data = evaluation.projector.data.model_copy(update=changes)
    held_out = evaluation.held_out.model_copy(update={k: v for k, v in changes.items() if k == "source"})
    projector = evaluation.projector.model_copy(update={"data": data})
    return evaluation.model_copy(update={"projector": projector, "held_out": held_out})


def test_the_report_and_the_refused_rows_are_files_of_the_run(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings, tmp_path: Path
) -> None:
    evaluation = make_evaluation()
    recorded = record(spec, evaluation, settings, {})
    folder = Path(connect(settings).download_artifacts(recorded.run_id, "data", str(tmp_path)))
    assert sorted(path.name for path in folder.iterdir()) == [
        "rejected-held-out.jsonl",
        "rejected-train.jsonl",
        "report.html",
    ]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert evaluation.projector.data.rows.digest in page
    assert evaluation.held_out.rows.digest in page
    for name, wanted in (("train", "c/bad"), ("held-out", "d/bad")):
        (line,) = (folder / f"rejected-{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line)["id"] == wanted


def test_a_snapshot_that_is_gone_leaves_a_failed_run_and_no_version(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings
) -> None:
    evaluation = make_evaluation()
    rows = evaluation.held_out.rows
    folder = store.home() / "store" / rows.kind / rows.digest
    folder.rename(folder.with_name("gone"))
    with pytest.raises(MissingArtifact, match="run again with --refresh"):
        record(spec, evaluation, settings, {})


def test_the_next_night_finds_where_this_run_stopped(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings
) -> None:
    ended = Cursor(shard=2, row=17, behind="e" * 64)
    evaluation = reading(make_evaluation(), ended=ended, origin="jsonl:a.jsonl/train", num_left=1234)
    recorded = record(spec, evaluation, settings, {})
    tags = connect(settings).get_run(recorded.run_id).data.tags
    assert json.loads(tags["llava.data.cursor"]) == {"shard": 2, "row": 17, "behind": "e" * 64}
    assert tags["llava.data.origin"] == "jsonl:a.jsonl/train"
    assert tags["llava.data.num_left"] == "1234"
    assert last_read(settings, evaluation.projector.model, "jsonl:a.jsonl/train")[0] == ended  # type: ignore[index]
    assert last_read(settings, evaluation.projector.model, "jsonl:b.jsonl/train") is None


def test_a_source_without_an_end_has_nothing_left_to_tell(
    spec: RunSpec, make_evaluation: MakeEvaluation, settings: Settings
) -> None:
    recorded = record(spec, reading(make_evaluation(), num_left=None), settings, {})
    assert "llava.data.num_left" not in connect(settings).get_run(recorded.run_id).data.tags


HUB = HubSource(repo_id="owner/set", revision=COMMIT, train_split="train", test_split="validation")
SOURCES: dict[str, tuple[Source, str, dict[str, Any]]] = {
    "scenes": (ScenesSource(seed=3), "code", {"seed": 3, "kind": "scenes", "origin": "scenes:1"}),
    "easy-vqa": (EasyVqaSource(), "code", {"requirement": "easy-vqa==1.0"}),
    "hub": (HUB, "hugging_face", {"path": "owner/set", "revision": COMMIT, "split": "train"}),
    "parquet": (ParquetSource(path="/data/shards"), "local", {"uri": "file:///data/shards"}),
    "jsonl": (JsonlSource(path="/data/a b.jsonl"), "local", {"uri": "file:///data/a%20b.jsonl"}),
    "llava-json": (LlavaJsonSource(path="/data/l.json", images="/data/i"), "local", {"uri": "file:///data/l.json"}),
    "webdataset": (WebDatasetSource(path="/data/tars"), "local", {"uri": "file:///data/tars"}),
    "folder": (FolderSource(path="/data/stamps"), "local", {"uri": "file:///data/stamps"}),
}


@pytest.mark.parametrize(("source", "kind", "wanted"), SOURCES.values(), ids=SOURCES)
def test_every_source_is_a_data_set_that_mlflow_can_open_again(
    source: Source, kind: str, wanted: dict[str, Any], make_evaluation: MakeEvaluation
) -> None:
    from mlflow.data import get_source

    from llava_pipeline.tracking.run import _dataset_input

    snapshot = reading(make_evaluation(), source=source).projector.data
    dataset = _dataset_input(snapshot, "training").dataset
    assert dataset.source_type == kind
    found = get_source(dataset).to_dict()
    assert wanted.items() <= (found.get("tags") or found).items()
    assert json.loads(dataset.profile)["num_near_duplicates"] == 0


def test_the_held_out_rows_of_a_hub_data_set_are_of_their_own_split(make_evaluation: MakeEvaluation) -> None:
    from llava_pipeline.tracking.run import _dataset_input

    held_out = reading(make_evaluation(), source=HUB).held_out
    assert json.loads(_dataset_input(held_out, "evaluation").dataset.source)["split"] == "validation"
    held_out = reading(make_evaluation(), source=HUB.model_copy(update={"test_split": None})).held_out
    assert json.loads(_dataset_input(held_out, "evaluation").dataset.source)["split"] == "train"
