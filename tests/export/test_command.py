"""``llava-pipeline export`` over a recorded version, as a person gives it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llava_pipeline.export.verify import XLLAMACPP
from llava_pipeline.tracking.settings import URI_VARIABLE
from tests.cli.conftest import Command, command
from tests.serving.served import copied, trained_home

__all__ = ["command", "trained_home"]


@pytest.fixture(scope="module")
def recorded(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a recorded champion of the pocket profile."""
    return copied(trained_home, tmp_path_factory.mktemp("recorded") / "home").parent


@pytest.fixture(autouse=True)
def in_its_home(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(recorded / "home"))
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    monkeypatch.chdir(recorded)


def test_a_version_is_exported_verified_and_told(command: Command, tmp_path: Path) -> None:
    ended = command("export", "champion", str(tmp_path / "out"), "--to", "hf", "--prompts", "4", "--json")
    assert ended.exit_code == 0, ended.err
    assert ended.document["verified"]
    assert ended.document["checks"][0]["num_same_ids"] == 4
    assert json.loads((tmp_path / "out" / "verification.json").read_text()) == ended.document["checks"]
    taken = command("export", "1", str(tmp_path / "out"))
    assert (taken.exit_code, "exists already" in taken.error) == (2, True)


def test_what_cannot_be_done_is_told_in_one_sentence(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    unknown = command("export", "9", out)
    assert (unknown.exit_code, "no version" in unknown.error or "9" in unknown.error) == (2, True)
    contradiction = command("export", "1", out, "--quantize", "q8_0")
    assert (contradiction.exit_code, contradiction.error) == (
        2, "--quantize q8_0 is for --to gguf; leave it out, or export to gguf",
    )  # fmt: skip
    without = command("export", "1", out, "--vllm", sys.executable)
    assert (without.exit_code, "is not a Python that finds vLLM" in without.error) == (2, True)
    nowhere = command("export", "1", out, "--vllm", str(tmp_path / "python"))
    assert (nowhere.exit_code, "is not a Python that finds vLLM" in nowhere.error) == (2, True)
    other = command("export", "1", out, "--to", "gguf", "--vllm", sys.executable)
    assert (other.exit_code, "leave it out, or else --to gguf" in other.error) == (2, True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == XLLAMACPP else object())
    missing = command("export", "1", out, "--to", "gguf")
    assert (missing.exit_code, "pip install xllamacpp" in missing.error) == (2, True)
    assert not Path(out).exists()
