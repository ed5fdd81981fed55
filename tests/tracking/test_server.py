"""The same over HTTP, with a server started by the command that the settings give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_pipeline.contracts import Evidence, Inspection
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import listing, promotion, registry, verdict
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.gate import decide
from llava_pipeline.tracking.run import record
from llava_pipeline.tracking.settings import Settings
from tests.tracking.conftest import MakeEvaluation
from tests.tracking.server import running


@pytest.fixture
def served(settings: Settings, home: Path) -> Iterator[Settings]:
    """Settings of a client of a running server."""
    with running(home) as client:
        yield client


@pytest.mark.slow
def test_record_promote_and_download_over_http(
    spec: RunSpec, make_evaluation: MakeEvaluation, served: Settings, home: Path
) -> None:
    recorded = record(spec, make_evaluation(num_steps=450), served, {})  # more than one request may hold
    assert connect(served).get_run(recorded.run_id).info.artifact_uri.startswith("mlflow-artifacts:/")
    assert registry.champion(recorded.registered_model, served) is None
    own = recorded.evaluation.projector.projector.digest
    evidence = Evidence(inspection=Inspection(problem=None, projector_digest=own), champion=None)
    rules = decide(recorded.evaluation, evidence, None, served.gate)
    verdict.write(recorded, evidence, rules, served)
    moved = promotion.promote(recorded.registered_model, "1", None, served, who="a test", why="a test")
    assert (moved.champion, moved.previous) == ("1", None)
    folder = registry.download_projector("champion", recorded.registered_model, served)
    assert (folder / "projector.safetensors").read_bytes() == b"weights"
    (row,) = listing.runs(served, "tiny", 5)
    assert (row["run_id"], row["status"], row["aliases"]) == (recorded.run_id, "FINISHED", ["champion"])
    assert list((home / "mlartifacts").rglob("grid.png"))
