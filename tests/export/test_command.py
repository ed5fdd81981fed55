"""``llava-pipeline export`` over a recorded version, as a person gives it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_pipeline.export.verify import LLAMA_CPP
from llava_pipeline.tracking.settings import FILE_VARIABLE, URI_VARIABLE, Settings
from tests.cli.conftest import Command, command
from tests.deploy.recorded import record_here, train_here

__all__ = ["command"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one version of the tiny profile's projector."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_PIPELINE_HOME", str(folder / "home"))
        for variable in (URI_VARIABLE, FILE_VARIABLE, "MLFLOW_REGISTRY_URI"):
            patch.delenv(variable, raising=False)
        patch.chdir(folder)
        _, data, trained = train_here()
        record_here(trained, data, Settings())
    return folder


@pytest.fixture(autouse=True)
def in_its_home(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(recorded / "home"))
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    monkeypatch.chdir(recorded)


def test_a_version_is_exported_verified_and_told(command: Command, tmp_path: Path) -> None:
    ended = command("export", "1", str(tmp_path / "out"), "--to", "hf", "--profile", "tiny", "--prompts", "4", "--json")
    assert ended.exit_code == 0, ended.err
    assert ended.document["verified"]
    assert ended.document["checks"][0]["num_same_ids"] == 4
    assert json.loads((tmp_path / "out" / "verification.json").read_text()) == ended.document["checks"]
    taken = command("export", "1", str(tmp_path / "out"), "--profile", "tiny")
    assert (taken.exit_code, "exists already" in taken.error) == (2, True)


def test_what_cannot_be_done_is_told_in_one_sentence(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    unknown = command("export", "9", out, "--profile", "tiny")
    assert (unknown.exit_code, "no version" in unknown.error or "9" in unknown.error) == (2, True)
    contradiction = command("export", "1", out, "--quantize", "q8_0", "--profile", "tiny")
    assert (contradiction.exit_code, contradiction.error) == (
        2, "--quantize q8_0 is for --to gguf; leave it out, or export to gguf",
    )  # fmt: skip
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == LLAMA_CPP else object())
    missing = command("export", "1", out, "--to", "gguf", "--profile", "tiny")
    assert (missing.exit_code, "pip install xllamacpp" in missing.error) == (2, True)
    assert not Path(out).exists()
