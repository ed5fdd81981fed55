"""A language model that learns whole, split over two processes: it learns what one process learns, exactly again after
a kill, and what it leaves behind is whole."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import AssembledModel
from llava_pipeline.model import projector
from llava_pipeline.model.assemble import Llava, assemble, describe
from llava_pipeline.model.freeze import LANGUAGE_MODEL, full
from llava_pipeline.model.processor import Processor
from llava_pipeline.spec import PartSpec, StepSpec
from llava_pipeline.training import checkpoint
from llava_pipeline.training.features import Computed
from llava_pipeline.training.job import read_job, read_samples
from llava_pipeline.training.launch import launch
from llava_pipeline.training.loop import Place, held_out_loss
from llava_pipeline.training.step import PlainStep
from llava_pipeline.training.world import World
from tests.tiny import SPEC
from tests.training.job import (
    Event,
    Make,
    Trainer,
    a_job,
    checkpoints,
    history,
    left_over,
    nursery,
    outcome,
    samples_artifact,
    train,
    train_together,
    write_job,
)

WHOLE = PartSpec(mode="full", learning_rate=1e-3)
CHANGES: dict[str, Any] = {
    "language_model": WHOLE, "learning_rate": 3e-3, "max_steps": 6, "samples_per_step": 5, "tokens_per_pass": 150,
    "checkpoint_seconds": 1000,
}  # fmt: skip


@pytest.fixture
def whole(make: Make) -> Make:
    """Jobs of a language model that learns whole, an odd number of samples a step, a few of them in a pass."""

    def made(updates: dict[str, Any] | None = None, **changes: Any) -> Path:
        return make(updates, **(CHANGES | changes))

    return made


def result(out: Path) -> checkpoint.State:
    """What is left behind."""
    found = checkpoint.newest(out / "result")
    assert found is not None
    return found


def looks(out: Path) -> list[float]:
    """The held-out losses."""
    return [row["held_out_loss"] for row in history(out) if row["held_out_loss"] is not None]


def assert_learned_alike(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    """The same samples, losses, norms and weights, but for the order of sums."""
    for key, within in (("samples", 0), ("loss", tolerance), ("grad_norm", 10 * tolerance)):
        found = [row[key] for row in history(first)]
        wanted = [row[key] for row in history(second)]
        assert found == (pytest.approx(wanted, rel=within) if within else wanted), key
    assert looks(first) == pytest.approx(looks(second), rel=tolerance)
    weights, others = result(first)[0], result(second)[0]
    assert weights.keys() == others.keys()
    assert any(name.startswith(LANGUAGE_MODEL) for name in weights)
    differences = {name: float((value - others[name]).abs().max()) for name, value in weights.items()}
    assert max(differences.values()) <= tolerance, differences


CASES: dict[str, dict[str, Any]] = {
    "uneven passes": {},
    "recomputed": {"step": StepSpec(recompute=True)},
    "one has no sample": {"samples_per_step": 1},
    "one has no picture": {"samples_per_step": 2, "max_steps": 9},
    "the projector frozen": {"projector": PartSpec(mode="full", learning_rate=0.0)},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_two_processes_learn_what_one_does(whole: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    job = whole(**changes)
    train(job, tmp_path / "one")
    ranks = train_together(job, tmp_path / "two")
    assert_learned_alike(tmp_path / "two", tmp_path / "one")
    assert [rank.notes() for rank in ranks] == [[], []]
    if changes.get("samples_per_step") == 2:
        pictures = [sorted(sample % 4 != 3 for sample in row["samples"]) for row in history(tmp_path / "two")]
        assert [False, True] in pictures


def test_in_16_bits_two_processes_learn_nearly_what_one_does(whole: Make, tmp_path: Path) -> None:
    job = whole(precision="bf16")
    train(job, tmp_path / "one")
    train_together(job, tmp_path / "two")
    first, second = (result(tmp_path / name)[0] for name in ("one", "two"))
    assert [row["loss"] for row in history(tmp_path / "two")] == pytest.approx(
        [row["loss"] for row in history(tmp_path / "one")], rel=2e-3
    )
    assert {value.dtype for value in second.values()} == {torch.float32}
    moved = sum(int((value != value.bfloat16().float()).sum()) for value in second.values())
    assert moved > 0.9 * sum(value.numel() for value in second.values())  # what is learned was not rounded
    assert first.keys() == second.keys()


def test_a_head_of_its_own_is_split_too(processor: Processor, assembled: AssembledModel, tmp_path: Path) -> None:
    part = SPEC.backbones.language_model
    untied = part.model_copy(update={"overrides": part.overrides | {"tie_word_embeddings": False}})
    backbones = assembled.backbones.model_copy(update={"language_model": fetch(untied, None, 0)})
    model = describe(assemble(backbones, SPEC.model), backbones, SPEC.model)
    job = write_job(a_job(model, processor, **CHANGES), tmp_path)
    train(job, tmp_path / "one")
    train_together(job, tmp_path / "two")
    assert_learned_alike(tmp_path / "two", tmp_path / "one")
    assert f"{LANGUAGE_MODEL}lm_head.weight" in result(tmp_path / "two")[0]


def test_each_process_holds_half(whole: Make, out: Path, shared: Llava) -> None:
    ranks = train_together(whole(), out)
    total = sum(value.nbytes for value in full(shared.model).values()) / 1e6
    for rank in ranks:
        (told,) = [note for note in rank.notes("info") if "this process holds" in note]
        held, of = map(float, re.findall(r"[\d.]+(?= of| MB)", told))
        assert of == pytest.approx(total, rel=0.01)
        assert held == pytest.approx(total / 2, rel=0.02)
    assert result(out)[1]["num_learned"] == sum(value.numel() for value in full(shared.model).values()) + sum(
        value.numel() for value in shared.model.model.multi_modal_projector.parameters()
    )
    assert result(out)[1]["num_processes"] == 2


def test_killed_twice_it_comes_to_the_same_bytes(whole: Make, tmp_path: Path) -> None:
    job, out = whole(checkpoint_seconds=0, max_steps=8), tmp_path / "killed"
    train_together(job, tmp_path / "whole")
    saved = 0
    for first in (0, 1):

        def kill(ranks: list[Trainer], first: int = first) -> None:
            ranks[0].until(3)
            ranks[first].send(signal.SIGKILL)
            ranks[1 - first].send(signal.SIGKILL)

        train_together(job, out, faults=[("sleep_in_steps", 0.05)], code=-signal.SIGKILL, meanwhile=kill)
        assert saved + 2 <= int(checkpoints(out)[-1].name) <= saved + 4
        saved = int(checkpoints(out)[-1].name)
    ranks = train_together(job, out)
    assert ranks[0].steps == list(range(saved + 1, 9))
    assert outcome(out) == outcome(tmp_path / "whole")


def test_killed_while_weights_are_gathered_for_a_checkpoint_it_begins_anew(whole: Make, out: Path) -> None:
    job = whole(checkpoint_seconds=0, max_steps=3)
    in_the_middle = ("die_in", "training/stored.py", "write_tensors", 650)
    ranks = train_together(job, out, faults=[in_the_middle], code=(-signal.SIGKILL, 1))
    assert ranks[0].steps == [1]
    assert checkpoints(out) == []
    (half_written,) = left_over(out)
    assert (half_written / checkpoint.TENSORS).stat().st_size > 0
    assert train_together(job, out)[0].steps == [1, 2, 3]
    assert [row["step"] for row in history(out)] == [1, 2, 3]
    assert left_over(out) == []


@pytest.mark.parametrize("first", [1, 2])
def test_another_number_of_processes_goes_on_with_it(whole: Make, tmp_path: Path, first: int) -> None:
    """Eight steps by one and two processes in turn: but for the order of sums it is what one process learns."""
    job, out = whole(checkpoint_seconds=0, max_steps=8), tmp_path / "mixed"

    def stop(ranks: list[Trainer]) -> None:
        ranks[0].until(3)
        ranks[0].send(signal.SIGTERM)

    if first == 2:
        train_together(job, out, faults=[("sleep_in_steps", 0.05)], code=143, meanwhile=stop)
        train(job, out)
    else:
        alone = nursery().start(job, out, faults=[("sleep_in_steps", 0.05)])
        stop([alone])
        assert alone.end() == 143
        train_together(job, out)
    train(job, tmp_path / "one")
    assert_learned_alike(out, tmp_path / "one")


def test_what_is_left_behind_fits_a_plain_model(whole: Make, out: Path, llava: Llava, tmp_path: Path) -> None:
    job = whole()
    train_together(job, out)
    told = read_job(job)
    (tmp_path / "artifact").mkdir()
    projector.save(tmp_path / "artifact", result(out)[0], told.model, {})
    projector.put(llava.model, projector.load(tmp_path / "artifact", told.model))
    assert told.held_out is not None
    samples, pixels = read_samples(told.held_out, llava.processor.image_token_id)
    device = torch.device("cpu")
    seen = Computed(llava.model, pixels, llava.processor.normalise, device)
    seen.load(samples.images_of(range(len(samples))), [])
    step = PlainStep(llava.model, samples, seen)
    assert held_out_loss(step, World(0, 1, device), Place(), None) == pytest.approx(looks(out)[-1], rel=1e-5)


def test_precision_that_needs_a_loss_scale_is_refused(whole: Make, out: Path) -> None:
    first, second = train_together(whole(precision="fp16"), out, code=2)
    for rank in (first, second):
        assert rank.error["kind"] == "SpecError"
        assert "set training.precision=bf16 or fp32" in rank.error["text"]


def test_out_of_memory_says_what_to_lower(whole: Make, out: Path, processor: Processor) -> None:
    many = samples_artifact(processor, 3000)
    job = whole({"train": many, "held_out": None}, max_steps=1, samples_per_step=3000, tokens_per_pass=10**6)
    ranks = train_together(job, out, faults=[("limit_memory", 300_000_000)], code=1)
    error = next(event for rank in ranks for event in rank.events if event["event"] == "error")
    assert error["kind"] == "OutOfMemory"
    told = r"pass of \d+ tokens .* process [01] of 2 has; set training.tokens_per_pass \(now 1000000\) to less"
    assert re.search(told, error["text"])


@pytest.mark.slow
def test_started_by_torchrun_and_cancelled_it_goes_on(
    whole: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = whole(max_steps=60)

    class Cancelled(BaseException):
        pass

    def cancel(event: Event) -> None:
        if event.get("step") == 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        launch(job, tmp_path / "out", 2, cancel)
    saved = int(checkpoints(tmp_path / "out")[-1].name)
    assert 4 <= saved < 60
    followed: list[Event] = []
    launch(job, tmp_path / "out", 2, followed.append)
    assert [event["step"] for event in followed if event["event"] == "step"] == list(range(saved + 1, 61))
    launch(job, tmp_path / "whole", 2, lambda event: None)
    assert outcome(tmp_path / "out", optimizer=False) == outcome(tmp_path / "whole", optimizer=False)
