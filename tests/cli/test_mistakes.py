"""Every mistake ends in one sentence with its remedy: exit code 2 for the person's, 1 for what failed."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--profile", "nosuch"],
            "no profile 'nosuch'; there are: budget, budget-b16, easy-vqa, llama-3.1-8b, llava-1.5, pocket",
        ),
        (["--profile", "nosuch.yaml"], "cannot read the profile file 'nosuch.yaml'"),
        (["--set", "training.max_step=20"], "training.max_step: unknown key"),
        (["--set", "training.max_steps=0"], "training.max_steps: input should be greater than 0 (found 0)"),
        (["--set", "training.max_steps"], "write it as --set training.max_steps=20"),
        (["--set", "training.learning_rate=fast"], "training.learning_rate: input should be a valid number"),
        (["--set", "data.source=nosuch"], "data.source"),
    ],
)
def test_a_wrong_request_is_the_person_s_mistake(command: Command, arguments: list[str], message: str) -> None:
    for name in ("plan", "run"):
        ended = command(name, *arguments)
        assert ended.exit_code == 2
        assert message in ended.error


def test_an_unknown_option_is_told(command: Command) -> None:
    ended = command("run", "--nosuch")
    assert ended.exit_code == 2
    assert "No such option" in ended.err


def test_an_unreachable_server_is_told_before_anything_starts(
    command: Command, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    ended = command("run", "--profile", "tiny")
    assert ended.exit_code == 1
    assert "does not answer" in ended.error
    assert "start it with" in ended.error
    assert not home.exists()


def test_a_question_before_any_run_names_the_remedy(command: Command, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "scene.png")
    ended = command("chat", str(tmp_path / "scene.png"), "What color is the circle?")
    assert ended.exit_code == 2
    assert "run the profile first" in ended.error


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "check the path"), (b"no picture at all", "image_unreadable"), (b"", "image_unreadable")],
)
def test_a_file_that_is_no_picture_is_told(
    command: Command, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "scene.png"
    if content is not None:
        path.write_bytes(content)
    ended = command("chat", str(path), "What color is the circle?")
    assert ended.exit_code == 2
    assert message in ended.error


def test_an_unexpected_error_is_one_sentence_and_a_trace_only_on_request(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_pipeline.tracking import listing

    def broken(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(listing, "runs", broken)
    ended = command("runs")
    assert (ended.exit_code, ended.error) == (
        1,
        "unexpected RuntimeError: two lines; run again as `llava-pipeline --debug ...` for the stack trace",
    )
    ended = command("--debug", "runs")
    assert ended.exit_code == 1
    assert "Traceback" in ended.err


def test_a_machine_that_is_too_small_is_told_before_anything_is_fetched(command: Command, home: Path) -> None:
    wide = "backbones.language_model.shape.intermediate_size=14336000"
    ended = command("run", "--profile", "llama-3.1-8b", "--set", wide)
    assert ended.exit_code == 2
    assert "in the smallest pass; `llava-pipeline plan --profile llama-3.1-8b --stage align` says what" in ended.error
    assert not (home / "store").exists()


def test_an_unknown_device_is_told_with_the_known_ones(command: Command) -> None:
    ended = command("plan", "--device", "m1")
    assert (ended.exit_code, ended.error.startswith("no device 'm1'; there are here, t4, ")) == (2, True)
