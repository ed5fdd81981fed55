"""A training that is killed, stopped, moved or damaged comes to the same bytes, or refuses and says why."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_pipeline.model.processor import Processor
from llava_pipeline.training import checkpoint
from llava_pipeline.training.job import TrainingJob
from llava_pipeline.training.samples import sample_indices
from tests.training.job import (
    NUM_SAMPLES,
    RUNS,
    Make,
    Trainer,
    checkpoints,
    history,
    left_over,
    nursery,
    outcome,
    samples_artifact,
    samples_seen,
    train,
    train_together,
    uninterrupted,
)


def stop_after(job: Path, out: Path, step: int, number: signal.Signals = signal.SIGTERM) -> Trainer:
    """Train as far as a step, or a little further, and be stopped."""
    trainer = nursery().start(job, out)
    trainer.until(step)
    trainer.send(number)
    assert trainer.end() == 143, trainer.complaint
    return trainer


# --------------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize(
    ("kills", "most_steps", "changes"),
    [
        pytest.param(4, 3, {"checkpoint_seconds": 0}, id="saved at every step"),
        pytest.param(3, 9, {"checkpoint_seconds": 0.03}, id="saved now and then"),
        pytest.param(20, 3, {"checkpoint_seconds": 0, "seed": 1}, marks=pytest.mark.slow, id="twenty times"),
        pytest.param(
            20, 12, {"checkpoint_seconds": 0.05, "seed": 2}, marks=pytest.mark.slow, id="twenty, now and then"
        ),
        pytest.param(
            20, 3, {"checkpoint_seconds": 0, "features_gb": 0.0}, marks=pytest.mark.slow, id="twenty, no cache"
        ),
    ],
)
def test_killed_at_random_moments_it_comes_to_the_same_bytes(
    make: Make, out: Path, kills: int, most_steps: int, changes: dict[str, Any]
) -> None:
    job = make(max_steps=20 + 3 * kills, **changes)
    moments = random.Random(kills)
    for _ in range(kills):
        trainer = nursery().start(job, out)
        if moments.random() < 0.25:  # before the first step, as a rule
            time.sleep(moments.uniform(0, 0.3))
        else:
            trainer.until(moments.randint(1, most_steps))
            time.sleep(moments.uniform(0, 0.015))
        assert trainer.kill() == -signal.SIGKILL
    train(job, out)
    every_step = changes["checkpoint_seconds"] == 0
    assert outcome(out, every_step) == uninterrupted(job, every_step)
    assert samples_seen(out) == sample_indices(RUNS, changes.get("seed", 0), 0, len(samples_seen(out)))
    assert [row["step"] for row in history(out)] == list(range(1, 21 + 3 * kills))
    assert left_over(out) == []


def test_killed_before_anything_was_saved_it_begins_anew(make: Make, out: Path) -> None:
    job = make(checkpoint_seconds=1000)
    trainer = nursery().start(job, out)
    trainer.until(4)
    trainer.kill()
    assert checkpoints(out) == []
    assert train(job, out).steps == list(range(1, 12))
    assert outcome(out, optimizer=False) == uninterrupted(job, optimizer=False)


NUM_LINES = 75  # of a save, at least, that are run when it also removes an old checkpoint


def die_in_a_save(make: Make, out: Path, lines: list[int]) -> None:
    """Be killed at these lines of a save, in one run after the other; each makes a step or two."""
    job = make(max_steps=len(lines) * 2 + 5)
    for line in lines:
        trainer = train(job, out, faults=[("die_in_save", 2, line)], code=-signal.SIGKILL)
        found = checkpoint.newest(out / "checkpoints")
        assert found is not None
        assert found[1]["place"]["used"]["steps"] in (trainer.steps[0], trainer.steps[0] + 1)
        assert found[1]["history_bytes"] <= (out / "history.jsonl").stat().st_size
        assert trainer.notes() == []
    train(job, out)
    assert outcome(out) == uninterrupted(job)
    assert left_over(out) == []


def test_killed_inside_a_save_it_goes_on_from_the_one_before(make: Make, out: Path) -> None:
    die_in_a_save(make, out, [1, 10, 20, 30, 40, 55])


@pytest.mark.slow
def test_killed_at_any_line_of_a_save_it_goes_on(make: Make, out: Path) -> None:
    die_in_a_save(make, out, list(range(1, NUM_LINES)))


@pytest.mark.parametrize("line", [1, 30, 45])
def test_killed_while_the_result_is_written_it_writes_it_again(make: Make, out: Path, line: int) -> None:
    job = make(checkpoint_seconds=1000)
    train(job, out, faults=[("die_in_save", 1, line)], code=-signal.SIGKILL)
    train(job, out)
    assert outcome(out, optimizer=False) == uninterrupted(job, optimizer=False)
    assert left_over(out) == []


# --------------------------------------------------------------------------------------------- damaged


def truncate(folder: Path) -> None:
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    path = folder / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_state(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"history_bytes"', '"history_bites"'), encoding="utf-8")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def lose(name: str) -> Callable[[Path], None]:
    def lost(folder: Path) -> None:
        (folder / name).unlink()

    return lost


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(truncate, id="truncated"),
        pytest.param(flip, id="one bit flipped"),
        pytest.param(edit_state, id="state edited"),
        pytest.param(empty, id="emptied"),
        pytest.param(lose("MANIFEST.json"), id="no manifest"),
        pytest.param(lose("state.safetensors"), id="no tensors"),
        pytest.param(lose("state.json"), id="no state"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
    make: Make, out: Path, damage: Callable[[Path], None]
) -> None:
    job = make()
    stop_after(job, out, 5)
    before, newest = checkpoints(out)
    damage(newest)
    trainer = train(job, out)
    (note,) = trainer.notes()
    assert newest.name in note
    assert "damaged" in note
    assert "the one before it is used" in note
    assert trainer.steps[0] == int(before.name) + 1
    assert outcome(out) == uninterrupted(job)


def test_with_every_checkpoint_damaged_it_begins_anew(make: Make, out: Path) -> None:
    job = make()
    stop_after(job, out, 5)
    for folder in checkpoints(out):
        flip(folder)
    trainer = train(job, out)
    assert len(trainer.notes()) == 2
    assert trainer.steps == list(range(1, 12))
    assert outcome(out) == uninterrupted(job)


def test_damaged_checkpoints_do_not_crowd_out_new_ones(make: Make, out: Path) -> None:
    job = make()
    stop_after(job, out, 6)
    for folder in checkpoints(out):
        flip(folder)
    second = nursery().start(job, out)
    second.until(3)
    second.kill()
    third = train(job, out)
    assert third.steps[0] > 2
    assert outcome(out) == uninterrupted(job)


def test_a_history_that_was_lost_is_not_made_up(make: Make, out: Path) -> None:
    job = make()
    stop_after(job, out, 5)
    (out / "history.jsonl").unlink()
    trainer = nursery().start(job, out)
    assert trainer.end() in (0, 1, 2)
    assert b"\0" not in (out / "history.jsonl").read_bytes()
    if (out / "result").exists():
        assert outcome(out) == uninterrupted(job)


def test_a_damaged_result_is_made_again(make: Make, out: Path) -> None:
    job = make()
    train(job, out)
    flip(next((out / "result").iterdir()))
    train(job, out)
    assert outcome(out) == uninterrupted(job)


# --------------------------------------------------------------------------------------------- where it goes on


@pytest.mark.parametrize("steps", [0, 2, 4], ids=["before the first step", "an epoch's end", "two epochs' end"])
def test_at_an_epochs_end_no_sample_is_skipped_or_repeated(make: Make, out: Path, steps: int) -> None:
    job = make(max_steps=6, samples_per_step=NUM_SAMPLES // 2)
    train(job, out, faults=[("die_in_save", steps + 1, 1)], code=-signal.SIGKILL)
    assert [int(path.name) for path in checkpoints(out)] == list(range(1, steps + 1))[-2:]
    assert train(job, out).steps == list(range(steps + 1, 7))
    seen = samples_seen(out)
    for epoch in range(3):
        assert sorted(seen[epoch * NUM_SAMPLES :][:NUM_SAMPLES]) == list(range(NUM_SAMPLES))
    assert outcome(out) == uninterrupted(job)


def test_stopped_with_the_last_step_made_it_only_finishes(make: Make, out: Path) -> None:
    job = make()
    train(job, out, faults=[("die_in_save", 12, 1)], code=-signal.SIGKILL)
    assert train(job, out).steps == []
    assert outcome(out) == uninterrupted(job)


def test_a_finished_training_is_left_as_it_is(make: Make, out: Path) -> None:
    job = make()
    train(job, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    trainer = train(job, out)
    assert [event["event"] for event in trainer.events] == ["done"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_newest_two_checkpoints_are_kept(make: Make, out: Path) -> None:
    train(make(), out)
    assert [path.name for path in checkpoints(out)] == ["000000010", "000000011"]


@pytest.mark.parametrize("features_gb", [4.0, 0.0], ids=["features kept", "features computed"])
def test_two_runs_of_a_job_are_the_same_bytes(make: Make, tmp_path: Path, features_gb: float) -> None:
    job = make(features_gb=features_gb)
    train(job, tmp_path / "again")
    assert outcome(tmp_path / "again") == uninterrupted(job)


# --------------------------------------------------------------------------------------------- other machines


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in history(out)]


def reference(job: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in uninterrupted(job)["history"].splitlines()]


def assert_alike(out: Path, job: Path) -> None:
    """The same samples in the same steps; every number equal but for rounding."""
    found, expected = history(out), reference(job)
    exact = ("step", "samples", "num_samples", "num_tokens", "num_supervised_tokens", "skipped", "learning_rate")
    for name in exact:
        assert [row[name] for row in found] == [row[name] for row in expected], name
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-4), name


def test_another_number_of_threads_goes_on_with_the_same_samples(make: Make, out: Path) -> None:
    job = make()
    stop_after(job, out, 4)
    train(job, out, faults=[("threads", 2)])
    assert_alike(out, job)


def test_two_processes_train_as_one_does(make: Make, tmp_path: Path) -> None:
    job = make()
    for name in ("first", "second"):
        first, second = train_together(job, tmp_path / name)
        assert first.steps == list(range(1, 12))
        assert second.steps == []
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second")
    assert_alike(tmp_path / "first", job)
    held_out = [row["held_out_loss"] for row in history(tmp_path / "first") if row["held_out_loss"] is not None]
    assert held_out == pytest.approx([row["held_out_loss"] for row in reference(job) if row["held_out_loss"]], rel=1e-4)


def test_a_training_goes_on_with_another_number_of_processes(make: Make, out: Path) -> None:
    job = make()
    stop_after(job, out, 3)
    first, _ = train_together(job, out)
    assert first.steps[0] > 3
    assert_alike(out, job)


@pytest.mark.parametrize("max_samples", [45, 9], ids=["features kept", "features computed"])
def test_a_process_without_a_sample_of_the_last_step_waits_for_it(make: Make, out: Path, max_samples: int) -> None:
    last = [sample_indices(RUNS, seed, 0, max_samples)[-1] for seed in range(9)]
    seed = next(seed for seed in range(9) if last[seed] % 4 != 3)  # it has a picture
    job = make(max_steps=None, max_samples=max_samples, seed=seed)
    train_together(job, out)
    assert [row["num_samples"] for row in history(out)][-2:] == [4, 1]
    assert_alike(out, job)


# --------------------------------------------------------------------------------------------- changed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 7}, ["spec.seed=0 (now 7)"]),
        ({"learning_rate": 0.02}, ["spec.learning_rate=0.01 (now 0.02)"]),
        ({"max_steps": 12, "samples_per_step": 5}, ["spec.max_steps=11 (now 12)", "spec.samples_per_step=4 (now 5)"]),
    ],
)
def test_another_spec_is_refused_unless_told(make: Make, out: Path, changes: dict[str, Any], words: list[str]) -> None:
    stop_after(make(), out, 3)
    before = (out / "history.jsonl").read_bytes()
    trainer = train(make(**changes), out, code=2)
    assert trainer.error["kind"] == "OtherTraining"
    for word in [*words, str(out), "use another folder", "--allow-change"]:
        assert word in trainer.error["text"]
    assert trainer.error["text"] in trainer.complaint
    assert (out / "history.jsonl").read_bytes() == before
    trainer = train(make(**changes), out, "--allow-change")
    assert any(words[0] in note for note in trainer.notes())
    assert trainer.steps[0] > 3


def test_other_data_is_refused_unless_told(make: Make, out: Path, processor: Processor) -> None:
    stop_after(make(), out, 3)
    other = make({"train": samples_artifact(processor, NUM_SAMPLES, seed=5)})
    assert "train=" in train(other, out, code=2).error["text"]
    other = make({"held_out": None})
    assert "held_out=" in train(other, out, code=2).error["text"]
    train(other, out, "--allow-change")


def test_other_libraries_are_refused_unless_told(make: Make, out: Path) -> None:
    job = make()
    stop_after(job, out, 3)
    other = [("other_versions", "9.9.9")]
    text = train(job, out, faults=other, code=2).error["text"]
    assert "versions.torch=" in text
    assert "(now 9.9.9)" in text
    train(job, out, "--allow-change", faults=other)
    assert outcome(out) == uninterrupted(job)


@pytest.mark.parametrize("changes", [{"projector_seed": 3}, {"vision_feature_layer": -1}])
def test_another_model_is_refused(make: Make, out: Path, changes: dict[str, Any]) -> None:
    job = make()
    stop_after(job, out, 3)
    model = TrainingJob.model_validate_json(job.read_text(encoding="utf-8")).model
    changed = model.model_copy(update={"spec": model.spec.model_copy(update=changes)})
    assert "model." in train(make({"model": changed}), out, code=2).error["text"]


def test_what_decides_nothing_may_change_at_any_time(make: Make, out: Path) -> None:
    stop_after(make(), out, 3)
    trainer = train(make(price_per_hour=2.5, checkpoint_seconds=1000, num_processes=1), out)
    assert outcome(out, optimizer=False) == uninterrupted(make(), optimizer=False)
    cost = trainer.events[-3]["cost"]
    assert cost == pytest.approx(trainer.events[-3]["total_seconds"] / 3600 * 2.5)


def test_a_finished_training_is_not_passed_off_as_another(make: Make, out: Path) -> None:
    train(make(), out)
    assert "spec.seed" in train(make(seed=7), out, code=2).error["text"]


# --------------------------------------------------------------------------------------------- no numbers


def test_a_diverged_training_stays_diverged_when_started_again(make: Make, out: Path) -> None:
    job, faults = make(), [("no_number_from", 7)]
    assert train(job, out, faults=faults, code=1).error["kind"] == "Diverged"
    assert not (out / "result").exists()
    assert train(job, out, faults=faults, code=1).error["kind"] == "Diverged"
    assert not (out / "result").exists()


def test_steps_without_numbers_are_as_many_after_a_kill(make: Make, tmp_path: Path) -> None:
    job, faults = make(max_steps=10), [("no_number_from", 7)]
    train(job, tmp_path / "whole", faults=faults)
    train(job, tmp_path / "killed", faults=[*faults, ("die_in_save", 9, 1)], code=-signal.SIGKILL)
    train(job, tmp_path / "killed", faults=faults)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert [row["skipped"] for row in history(tmp_path / "whole")] == [False] * 6 + [True] * 4
    result = checkpoint.newest(tmp_path / "killed" / "result")
    assert result is not None
    assert result[1]["num_skipped_steps"] == 4


def test_the_copy_of_a_folder_goes_on_elsewhere(make: Make, out: Path, tmp_path: Path) -> None:
    job = make()
    stop_after(job, out, 4)
    shutil.copytree(out, tmp_path / "elsewhere")
    train(job, tmp_path / "elsewhere")
    assert outcome(tmp_path / "elsewhere") == uninterrupted(job)
