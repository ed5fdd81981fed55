"""vLLM for a CPU, in an environment of its own, from the exported folder alone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from llava_pipeline.export.card import Facts
from llava_pipeline.export.verify import Question, ask, expect, vllm_of
from llava_pipeline.model.assemble import Llava
from llava_pipeline.stages.export import export

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # its environment is installed first


@pytest.fixture(scope="module")
def python() -> Path:
    """Of that environment."""
    subprocess.run(["bash", "deploy/vllm.sh"], cwd=ROOT, check=True)
    return ROOT / ".venv-vllm" / "bin" / "python"


def test_vllm_answers_as_the_model_here(
    pocket: Llava, facts: Facts, questions: list[Question], python: Path, tmp_path: Path
) -> None:
    exported = export(pocket, facts, "hf", tmp_path / "out", "f16", questions, python)
    assert (exported.problem, exported.verified) == ("", True)
    check = exported.checks[1]
    assert check.engine == "vLLM"
    assert check.judged
    assert check.num_same_ids == check.num_same_first == len(questions)
    assert check.largest_top < 0.05


def test_what_vllm_does_not_load_is_told(
    pocket: Llava, facts: Facts, questions: list[Question], python: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    export(pocket, facts, "hf", folder, "f16", [])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    told = ask(folder, vllm_of(python), "as they are", pocket, questions, expect(pocket, questions))
    assert told.replies == ()
    assert told.problem
