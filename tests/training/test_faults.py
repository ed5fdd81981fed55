"""Signals, full disks, closed pipes, a second start, bad input, a bare machine: saved, told in words, gone on from.

The forks of ``tests.training.job`` serve here too; where the whole command is the claim, it is started as people do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from llava_pipeline.model.processor import Processor
from llava_pipeline.store import home as store_home
from llava_pipeline.training import checkpoint
from tests.conftest import ROOT
from tests.training.job import (
    NUM_SAMPLES,
    QUICK,
    Make,
    checkpoints,
    history,
    left_over,
    nursery,
    outcome,
    samples_artifact,
    train,
    train_together,
    uninterrupted,
)

# --------------------------------------------------------------------------------------------- asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes_on_exactly(make: Make, out: Path, number: signal.Signals) -> None:
    job = make(checkpoint_seconds=1000)
    trainer = nursery().start(job, out)
    trainer.until(3)
    trainer.send(number)
    assert trainer.end() == 143
    last = trainer.steps[-1]
    assert trainer.error["kind"] == "Interrupted"
    assert trainer.error["text"] == f"stopped after step {last}; start it again to go on from there"
    assert last < 11
    assert [int(path.name) for path in checkpoints(out)] == [last]
    assert train(job, out).steps == list(range(last + 1, 12))
    assert outcome(out, optimizer=False) == uninterrupted(job, optimizer=False)


def test_asked_again_and_again_it_still_saves_once(make: Make, out: Path) -> None:
    job = make(checkpoint_seconds=1000)
    trainer = nursery().start(job, out, faults=[("sleep_in_steps", 0.05)])
    trainer.until(2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        trainer.send(number)
    assert trainer.end() == 143
    train(job, out)
    assert outcome(out, optimizer=False) == uninterrupted(job, optimizer=False)


def test_asked_to_stop_before_its_first_step_it_goes_on_exactly(make: Make, out: Path) -> None:
    job = make(checkpoint_seconds=1000)
    trainer = nursery().start(job, out)
    trainer.until_note("tower features")
    trainer.send(signal.SIGTERM)
    assert trainer.end() == 143
    assert trainer.steps in ([1], [1, 2])
    train(job, out)
    assert outcome(out, optimizer=False) == uninterrupted(job, optimizer=False)


def test_two_processes_of_which_one_is_asked_stop_together(make: Make, out: Path) -> None:
    job = make(checkpoint_seconds=1000)

    def ask_one(ranks: list[Any]) -> None:
        ranks[0].until(3)
        ranks[1].send(signal.SIGTERM)

    ranks = train_together(job, out, faults=[("sleep_in_steps", 0.02)], code=143, meanwhile=ask_one)
    last = ranks[0].steps[-1]
    assert last < 11
    ranks = train_together(job, out)
    assert ranks[0].steps == list(range(last + 1, 12))


def test_with_nobody_listening_it_saves_and_ends(make: Make, out: Path) -> None:
    job = make(checkpoint_seconds=1000, max_steps=2000)
    trainer = nursery().start(job, out, whole_exit=True)
    trainer.until(3)
    trainer.stdout.close()
    code = trainer._wait()
    (saved,) = checkpoints(out)
    assert 3 <= int(saved.name) < 200
    assert code == 143
    assert "Traceback" not in trainer.complaint


# --------------------------------------------------------------------------------------------- the folder


def test_a_second_start_on_a_folder_is_refused_and_the_first_unharmed(make: Make, out: Path) -> None:
    job = make(max_steps=20)
    first = nursery().start(job, out, faults=[("sleep_in_steps", 0.03)])
    first.until(2)
    second = train(job, out, code=2)
    assert second.error["kind"] == "OtherTraining"
    assert second.error["text"] == f"another process trains in {out}; wait for it, stop it, or name another folder"
    assert second.complaint == f"error: {second.error['text']}\n"
    assert first.end() == 0
    assert first.steps == list(range(1, 21))
    assert outcome(out) == uninterrupted(job)


def test_a_killed_one_keeps_no_lock(make: Make, out: Path) -> None:
    job = make()
    first = nursery().start(job, out)
    first.until(2)
    first.kill()
    train(job, out)


def test_a_folder_that_cannot_be_made_is_told(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    trainer = nursery().start(make(), tmp_path / "file" / "out")
    assert trainer.end() in (1, 2)
    assert "Traceback" not in trainer.complaint
    assert str(tmp_path / "file") in trainer.error["text"]


# --------------------------------------------------------------------------------------------- a full disk


def test_a_disk_that_is_full_for_a_checkpoint_is_told_and_harms_nothing(make: Make, out: Path) -> None:
    job = make()
    first = nursery().start(job, out)
    first.until(3)
    first.send(signal.SIGTERM)
    assert first.end() == 143
    before = checkpoints(out)[-1]
    trainer = train(job, out, faults=[("limit_file_size", 20_000)], code=1)
    assert trainer.error["kind"] == "DiskFull"
    assert f"no space left below {out}" in trainer.error["text"]
    assert "Traceback" not in trainer.complaint
    assert checkpoint.read(before) is not None
    assert left_over(out) == []
    train(job, out)
    assert outcome(out) == uninterrupted(job)


def test_a_disk_that_is_full_for_the_history_is_told_and_harms_nothing(make: Make, out: Path) -> None:
    job = make(checkpoint_seconds=1000)
    trainer = nursery().start(job, out, faults=[("limit_file_size", 1500)])
    assert trainer.end() == 1
    assert "Traceback" not in trainer.complaint
    assert trainer.error["kind"] == "DiskFull"
    train(job, out)
    assert outcome(out, optimizer=False) == uninterrupted(job, optimizer=False)


def test_a_disk_that_is_full_for_the_result_is_told_and_harms_nothing(make: Make, out: Path) -> None:
    job = make(checkpoint_seconds=1000)
    assert train(job, out, faults=[("limit_file_size", 5000)], code=1).error["kind"] == "DiskFull"
    assert checkpoint.newest(out / "result") is None
    train(job, out)
    assert outcome(out, optimizer=False) == uninterrupted(job, optimizer=False)


# --------------------------------------------------------------------------------------------- kept features


def features_files() -> list[Path]:
    """Files of kept features, half written ones too."""
    return [path for path in (store_home() / "features").rglob("*") if path.is_file()]


def test_damaged_features_are_told_and_computed_again(make: Make, out: Path) -> None:
    job = make()
    expected = uninterrupted(job)
    for path in features_files():
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    trainer = train(job, out)
    assert any("are damaged; they are computed again" in note for note in trainer.notes())
    assert outcome(out) == expected


def test_killed_while_features_are_written_it_leaves_none_behind(make: Make, out: Path) -> None:
    job = make()
    expected = uninterrupted(job)
    for path in features_files():
        path.unlink()
    for line in (4, 5):
        train(job, out, faults=[("die_in", "training/features.py", "_write", line)], code=-signal.SIGKILL)
    train(job, out)
    assert outcome(out) == expected
    assert [path for path in features_files() if path.name.startswith(".")] == []


# --------------------------------------------------------------------------------------------- bad input


def test_a_sample_without_a_label_is_refused_in_words(make: Make, out: Path, processor: Processor) -> None:
    trainer = nursery().start(make({"train": samples_artifact(processor, NUM_SAMPLES, masked=5)}), out)
    assert trainer.end() in (1, 2)
    assert "Traceback" not in trainer.complaint
    assert "sample 5" in trainer.error["text"]
    assert "no supervised token" in trainer.error["text"]
    assert trainer.steps == []


def test_a_held_out_sample_without_a_label_is_refused_in_words(make: Make, out: Path, processor: Processor) -> None:
    trainer = nursery().start(make({"held_out": samples_artifact(processor, 4, masked=2)}), out)
    assert trainer.end() in (1, 2)
    assert "Traceback" not in trainer.complaint
    assert "no supervised token" in trainer.error["text"]


@pytest.mark.parametrize("features_gb", [4.0, 0.0], ids=["features kept", "features computed"])
@pytest.mark.parametrize("changes", [{"samples_per_step": 1}, {"tokens_per_pass": 8}], ids=["steps", "passes"])
def test_samples_without_a_picture_may_be_alone(
    make: Make, out: Path, changes: dict[str, int], features_gb: float
) -> None:
    train(make(max_steps=None, max_samples=NUM_SAMPLES + 2, features_gb=features_gb, **changes), out)
    assert sum(row["num_samples"] for row in history(out)) == NUM_SAMPLES + 2
    assert not any(row["skipped"] for row in history(out))


def test_data_without_any_picture_is_refused_in_words(make: Make, out: Path, processor: Processor) -> None:
    trainer = nursery().start(make({"train": samples_artifact(processor, 6, pictures=False)}), out)
    assert trainer.end() in (1, 2)
    assert "Traceback" not in trainer.complaint
    assert "picture" in trainer.error["text"]


def test_samples_that_were_changed_are_refused(make: Make, out: Path, processor: Processor) -> None:
    ref = samples_artifact(processor, NUM_SAMPLES, seed=9)
    path = store_home() / "store" / "samples" / ref.digest / "tokens.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    error = train(make({"train": ref}), out, code=1).error
    assert error["kind"] == "DamagedArtifact"
    assert "tokens.safetensors was changed" in error["text"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is no training job"),
        ('{"model": 1}', "is no training job: model"),
        ("[]", "is no training job"),
        (None, "cannot read the job"),
        (b"\xff\xfe\x00", "is no training job"),
    ],
)
def test_a_file_that_is_no_job_is_refused(tmp_path: Path, out: Path, content: str | bytes | None, words: str) -> None:
    path = tmp_path / "job.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    trainer = nursery().start(path, out)
    assert trainer.end() == 2, trainer.complaint
    assert words in trainer.error["text"]
    assert not out.exists()


# --------------------------------------------------------------------------------------------- more


BLOCKED = (
    "prefect", "mlflow", "datasets", "pyarrow", "PIL", "pandas", "requests", "matplotlib", "gguf", "typer", "rich",
    "fastapi", "dask", "ray", "psutil", "scipy", "sklearn", "torchvision", "accelerate",
)  # fmt: skip
BARE = """
import sys, runpy
from importlib.machinery import PathFinder
class Bare(PathFinder):
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else PathFinder.find_spec(name, path, target)
sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = ["llava_pipeline.training", {job!r}, {out!r}]
runpy.run_module("llava_pipeline.training", run_name="__main__", alter_sys=True)
"""


def test_a_bare_machine_trains_to_the_same_bytes(make: Make, out: Path) -> None:
    job = make()
    code = textwrap.dedent(BARE).format(blocked=BLOCKED, job=str(job), out=str(out))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | QUICK, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 12))
    assert events[-1] == {"event": "done"}
    assert outcome(out) == uninterrupted(job)


@pytest.mark.parametrize(
    ("more", "least"),
    [(300_000_000, 1), pytest.param(250_000_000, 2, marks=pytest.mark.slow)],
    ids=["once", "more than once"],
)
def test_out_of_memory_it_takes_smaller_passes_and_says_so(
    make: Make, out: Path, processor: Processor, more: int, least: int
) -> None:
    """One pass of these 3000 samples takes 560 MB, and the process may have less."""
    many = samples_artifact(processor, 3000)
    size: Any = {"max_steps": 1, "samples_per_step": 3000, "tokens_per_pass": 10**6, "step": {"share_picture": False}}
    job = make({"train": many, "held_out": None}, **size)
    whole, little = out / "whole", out / "little"
    (step,) = [event for event in train(job, whole).events if event["event"] == "step"]
    trainer = train(job, little, faults=[("limit_memory", more)])
    (limited,) = [event for event in trainer.events if event["event"] == "step"]
    told = [note for note in trainer.notes() if "memory ran out in a pass of" in note]
    assert len(told) == len(set(told)) >= least
    assert "a step is as large as before" in told[0]
    assert limited["tokens_per_pass"] < step["num_tokens"] < step["tokens_per_pass"]
    assert limited["samples"] == step["samples"]
    assert limited["loss"] == pytest.approx(step["loss"], rel=1e-5)
    assert limited["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_memory_for_not_even_one_sample_is_told(make: Make, out: Path, processor: Processor) -> None:
    many = samples_artifact(processor, 3000)
    job = make({"train": many, "held_out": None}, max_steps=1, samples_per_step=3000, tokens_per_pass=10**6)
    for more in (150_000_000, 100_000_000, 80_000_000):
        trainer = nursery().start(job, out, faults=[("limit_memory", more)])
        code = trainer.end()
        assert code in (0, 1)
        assert code == 0 or trainer.error["kind"] == "OutOfMemory", trainer.complaint[-500:]
