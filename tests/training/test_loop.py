"""The loop is repeatable, in a known order, touches the projector alone, and stops when numbers are none any more."""

from __future__ import annotations

import copy
import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from llava_pipeline.errors import Diverged, NothingToLearn, OutOfMemory, SpecError
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.freeze import frozen_digest
from llava_pipeline.model.processor import IGNORE_INDEX
from llava_pipeline.model.projector import digest_of, state_of
from llava_pipeline.spec import StepSpec, TrainingSpec, load_spec, profile_names
from llava_pipeline.training import device
from llava_pipeline.training.budget import Used
from llava_pipeline.training.device import choose_device, choose_precision, place
from llava_pipeline.training.features import Computed
from llava_pipeline.training.loop import (
    Learner,
    Pace,
    Place,
    StepRecord,
    Task,
    accumulate,
    is_out_of_memory,
    make_learner,
    train,
)
from llava_pipeline.training.samples import NO_PICTURE, Samples, collect, order, sample_indices
from llava_pipeline.training.step import PackedStep, PlainStep, Step, make_step
from llava_pipeline.training.world import World
from tests.tiny import features_of, samples_of

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
MANY = 1 << 14


def a_spec(**changes: Any) -> TrainingSpec:
    values = {"max_steps": 4, "samples_per_step": 4, "learning_rate": 1e-2, "device": "cpu", "precision": "fp32"}
    return TrainingSpec(**(values | changes))


class Given:
    """Features that are there."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.loaded: list[tuple[list[int], list[int]]] = []

    def load(self, images: Sequence[int], following: Sequence[int]) -> None:
        self.loaded.append((list(images), list(following)))

    def __call__(self, images: list[int]) -> Tensor:
        return self.features[images]


@dataclass
class Training:
    """A training of a copy of a model, and what became of it."""

    llava: Llava
    spec: TrainingSpec
    samples: Samples | None = None
    features: Tensor | None = None
    held_out: Samples | None = None
    world: World = ALONE
    place: Place = field(default_factory=Place)
    wrap: Callable[[Step], Step] = lambda step: step
    clock: Callable[[], float] | None = None
    stopped: Callable[[], bool] = bool
    records: list[StepRecord] = field(default_factory=list)
    paces: list[Pace] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.features is None:
            self.features = features_of(self.llava)
        self.samples = self.samples or samples_of(self.llava)
        self.model = copy.deepcopy(self.llava.model)
        self.dtype = choose_precision(self.spec.precision, CPU)
        place(self.model, CPU, self.dtype)
        self.given = Given(self.features)
        step = make_step(self.model, self.samples, self.given, self.dtype, self.spec.step)
        other = None
        if self.held_out is not None:
            other = make_step(self.model, self.held_out, self.given, self.dtype, self.spec.step, like=step)
        self.task = Task(self.wrap(step), self.given, other)
        projector = dict(self.model.model.multi_modal_projector.named_parameters())
        self.learner: Learner = make_learner(projector, self.spec, self.dtype)

    def run(self) -> Training:
        clock = {} if self.clock is None else {"clock": self.clock}
        for record, pace in train(
            self.task, self.learner, self.spec, self.world, self.place, stopped=self.stopped, **clock
        ):
            self.records.append(record)
            self.paces.append(pace)
        return self

    @property
    def digest(self) -> str:
        return digest_of(state_of(self.model))

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.records]

    @property
    def skipped(self) -> list[bool]:
        return [record.skipped for record in self.records]


def run(llava: Llava, spec: TrainingSpec, **changes: Any) -> Training:
    return Training(llava, spec, **changes).run()


def bad_pictures(llava: Llava, pictures: list[int], value: float = torch.inf) -> Tensor:
    features = features_of(llava)
    features[pictures] = value
    return features


def hook_on_gradient(training: Training, change: Callable[[Tensor], Tensor]) -> Any:
    return training.model.model.multi_modal_projector.linear_2.bias.register_hook(change)


def no_number(gradient: Tensor) -> Tensor:
    return gradient * math.nan


# --------------------------------------------------------------------------------------------- the same again


def test_the_same_seed_gives_the_same_bytes(llava: Llava) -> None:
    first = run(llava, a_spec())
    torch.rand(5)
    second = run(llava, a_spec())
    assert first.digest == second.digest
    assert first.records == second.records


def test_another_seed_gives_another_projector(llava: Llava) -> None:
    assert run(llava, a_spec(seed=1)).digest != run(llava, a_spec(seed=2)).digest


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_frozen_weights_never_change(llava: Llava, precision: str) -> None:
    training = Training(llava, a_spec(weight_decay=0.1, precision=precision))
    frozen, projector = frozen_digest(training.model), training.digest
    training.run()
    assert frozen_digest(training.model) == frozen
    assert training.digest != projector
    assert all(p.grad is None for p in training.model.parameters())


def test_it_learns_a_few_samples(lively: Llava) -> None:
    training = run(lively, a_spec(max_steps=25, samples_per_step=5, learning_rate=3e-2))
    assert training.losses[-1] < 0.8 * training.losses[0]
    assert not any(training.skipped)
    assert training.place.num_applied == 25


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_frozen_parts_in_half_precision_learn_alike(llava: Llava, precision: str) -> None:
    exact = run(llava, a_spec(max_steps=8))
    rounded = run(llava, a_spec(max_steps=8, precision=precision))
    assert rounded.losses == pytest.approx(exact.losses, rel=0.02)


def test_every_switch_off_learns_alike(lively: Llava) -> None:
    off = StepSpec(**dict.fromkeys(("pack", "share_prefix", "select", "fold", "lean"), False))
    assert run(lively, a_spec(step=off)).losses == pytest.approx(run(lively, a_spec()).losses, rel=1e-4)


def test_padded_batches_learn_alike(lively: Llava) -> None:
    def padded(step: Step) -> Step:
        assert isinstance(step, PackedStep)
        return PlainStep(training.model, step.samples, step.features)

    training = Training(lively, a_spec())
    training.task = replace(training.task, step=padded(training.task.step))
    assert training.run().losses == pytest.approx(run(lively, a_spec()).losses, rel=1e-4)


def test_it_goes_on_from_where_it_stands(llava: Llava) -> None:
    whole = run(llava, a_spec(max_steps=6))
    training = Training(llava, a_spec(max_steps=6))
    training.stopped = lambda: len(training.records) == 2  # asked during the third step
    training.run()
    assert training.place.used.steps == 3
    training.stopped = bool
    training.run()
    assert training.records == whole.records
    assert training.digest == whole.digest


# --------------------------------------------------------------------------------------------- device and precision


def test_the_projector_stays_in_full_precision(llava: Llava) -> None:
    place(llava.model, CPU, torch.bfloat16)
    parts = llava.model.model
    assert {p.dtype for p in parts.multi_modal_projector.parameters()} == {torch.float32}
    frozen = [*parts.vision_tower.parameters(), *parts.language_model.parameters(), *llava.model.lm_head.parameters()]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_frequencies_and_other_buffers_are_not_rounded(llava: Llava, precision: torch.dtype) -> None:
    before = {name: buffer.clone() for name, buffer in llava.model.named_buffers()}
    assert {name.rsplit(".", 1)[-1] for name in before} >= {"inv_freq", "original_inv_freq"}
    place(llava.model, CPU, precision)
    for name, buffer in llava.model.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer, before[name]), name


def test_placing_rounds_no_projector_and_keeps_the_head_tied(llava: Llava) -> None:
    before = digest_of(state_of(llava.model))
    place(llava.model, CPU, torch.bfloat16)
    assert digest_of(state_of(llava.model)) == before
    assert llava.model.lm_head.weight is llava.model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("computes", "emulates", "expected"),
    [(True, True, torch.bfloat16), (False, True, torch.float16), (False, False, torch.float16)],
)
def test_a_card_that_only_emulates_bf16_trains_in_fp16(
    monkeypatch: pytest.MonkeyPatch, computes: bool, emulates: bool, expected: torch.dtype
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return computes or (including_emulation and emulates)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert choose_precision("auto", torch.device("cuda")) == expected


def test_a_card_that_is_not_there_is_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(SpecError, match=r"but torch .* finds no card .* set training\.device=auto"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx2 avx512f avx512_bf16 fma", torch.bfloat16),
        ("flags : fpu amx_bf16 amx_tile", torch.bfloat16),
        ("flags : fpu avx2 avx512f", torch.float32),
        (None, torch.float32),
    ],
)
def test_a_cpu_trains_in_full_precision_unless_it_computes_in_bf16(
    flags: str | None, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(*_: Any, **__: Any) -> str:
        if flags is None:
            raise FileNotFoundError("no /proc here")
        return flags

    monkeypatch.setattr(device.Path, "read_text", read_text)
    assert choose_precision("auto", CPU) == expected
    assert [choose_precision(name, CPU) for name in ("fp16", "bf16")] == [torch.float16, torch.bfloat16]
    assert choose_device("cpu") == CPU


def test_the_optimizer_has_the_betas_of_the_spec(llava: Llava) -> None:
    assert a_spec().betas == (0.9, 0.999)
    assert run(llava, a_spec()).digest == run(llava, a_spec(betas=(0.9, 0.999))).digest
    assert run(llava, a_spec()).digest != run(llava, a_spec(betas=(0.9, 0.98))).digest


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,), (0.9, 0.98, 0.9)])
def test_betas_that_are_none_are_refused(betas: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="betas"):
        a_spec(betas=betas)


@pytest.mark.parametrize("profile", profile_names())
def test_recipes_made_by_others_have_torchs_betas(profile: str) -> None:
    ours = ("pocket", "easy-vqa", "smol", "real-cpu", "tiny")
    expected = (0.9, 0.98) if profile in ours else (0.9, 0.999)
    assert load_spec(profile).training.betas == expected


# --------------------------------------------------------------------------------------------- what a step tells


def test_a_record_has_what_was_seen(llava: Llava) -> None:
    training = run(llava, a_spec(seed=3))
    samples = samples_of(llava)
    for number, record in enumerate(training.records):
        seen = sample_indices(samples.runs, 3, number * 4, 4)
        rows = [samples.of(k) for k in seen]
        assert record.step == number + 1
        assert record.samples == seen
        assert record.num_samples == 4
        assert record.num_tokens == sum(len(ids) for ids, _ in rows)
        assert record.num_supervised_tokens == sum(int((labels[1:] != IGNORE_INDEX).sum()) for _, labels in rows)
        assert record.held_out_loss is None
    assert training.place.used.samples == 16
    assert training.records[-1].learning_rate == 2e-5


def test_a_record_is_plain_json(llava: Llava) -> None:
    (record,) = run(llava, a_spec(max_steps=1)).records
    assert StepRecord(**json.loads(json.dumps(record.as_json()))) == record


def test_the_pictures_of_a_step_and_of_the_next_are_asked_for(llava: Llava) -> None:
    training = run(llava, a_spec(seed=3, max_samples=14, max_steps=None))
    asked = training.given.loaded
    assert [here for here, _ in asked[1:]] == [following for _, following in asked[:-1]]
    assert [len(here) for here, _ in asked] == [4, 4, 4, 2]
    assert asked[-1][1] == []


@pytest.mark.parametrize("tokens", [1, 20, 40, 60])
def test_the_loss_is_a_mean_over_tokens_however_the_step_is_split(lively: Llava, tokens: int) -> None:
    whole = run(lively, a_spec(samples_per_step=5))
    split = run(lively, a_spec(samples_per_step=5), place=Place(tokens_per_pass=tokens))
    assert len(split.task.step.split(range(5), tokens)) > 1
    assert split.losses == pytest.approx(whole.losses, rel=1e-4)
    norms = [[record.grad_norm for record in training.records] for training in (split, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_the_gradient_of_a_step_is_that_of_one_pass(lively: Llava) -> None:
    def gradient(tokens: int) -> Tensor:
        training = Training(lively, a_spec())
        step, learner = training.task.step, training.learner
        count = step.samples.num_supervised(range(5))
        total = accumulate(step, learner, list(range(5)), count, Place(tokens_per_pass=tokens))
        found = torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])
        return torch.cat([found, torch.tensor([total])])

    whole = gradient(MANY)
    for tokens in (1, 25, 70):
        assert (gradient(tokens) - whole).norm() <= 1e-4 * whole[:-1].norm()


@pytest.mark.parametrize("tokens", [1, MANY])
def test_loss_and_gradient_of_a_record_are_those_of_the_mean(lively: Llava, tokens: int) -> None:
    (record,) = run(lively, a_spec(max_steps=1), place=Place(tokens_per_pass=tokens)).records
    training = Training(lively, a_spec())
    mean = training.task.step.loss(record.samples) / record.num_supervised_tokens
    mean.backward()
    norm = torch.stack([p.grad.norm() for p in training.learner.parameters if p.grad is not None]).norm()
    assert record.loss == pytest.approx(mean.item(), rel=1e-5)
    assert record.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_the_gradient_is_clipped_and_its_whole_norm_told(llava: Llava) -> None:
    def moved(max_grad_norm: float) -> tuple[float, float]:
        training = Training(
            llava, a_spec(max_steps=1, max_grad_norm=max_grad_norm, warmup_share=0.0, schedule="constant")
        )
        before = state_of(training.model)
        (record,) = training.run().records
        after = state_of(training.model)
        return record.grad_norm, max(float((after[name] - before[name]).abs().max()) for name in before)

    whole, free = moved(1e9)
    clipped_norm, clipped = moved(1e-12)  # far below AdamW's epsilon, which makes its step as small
    assert clipped_norm == whole > 1e-6
    assert free == pytest.approx(1e-2, rel=0.05)
    assert clipped < 1e-4 * free


# --------------------------------------------------------------------------------------------- order


def runs_of(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


LENGTHS = st.lists(st.integers(1, 4), min_size=1, max_size=12).map(lambda lengths: runs_of(*lengths))


@given(num=st.integers(1, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone(num: int, seed: int, epoch: int) -> None:
    before = torch.get_rng_state()
    runs = torch.arange(num + 1)
    found = order(runs, seed, epoch)
    assert sorted(found) == list(range(num))
    torch.rand(1)
    order.cache_clear()
    assert order(runs, seed, epoch) == found
    torch.set_rng_state(before)
    if num > 20:
        assert order(runs, seed, epoch + 1) != found
        assert order(runs, seed + 1, epoch) not in (found, order(runs, seed, epoch + 1))


@given(runs=LENGTHS, seed=st.integers(0, 99))
def test_samples_about_one_picture_stay_together_and_in_order(runs: Tensor, seed: int) -> None:
    found, begins = order(runs, seed, 0), runs.tolist()
    assert sorted(found) == list(range(begins[-1]))
    expected = order(torch.arange(len(runs)), seed, 0)  # of as many pictures with one sample each
    assert found == tuple(k for run in expected for k in range(begins[run], begins[run + 1]))


@pytest.mark.parametrize(
    ("images", "runs"),
    [([0], [0, 1]), ([0, 0, 0], [0, 3]), ([0, 1, 1, 0], [0, 1, 3, 4]), ([NO_PICTURE, NO_PICTURE, 2, 2], [0, 1, 2, 4])],
)
def test_a_run_is_of_samples_about_one_picture(images: list[int], runs: list[int]) -> None:
    ids = torch.tensor([5, 6])
    assert collect([ids] * len(images), [ids] * len(images), images).runs.tolist() == runs


@given(runs=LENGTHS, seed=st.integers(0, 99), start=st.integers(0, 90), counts=st.lists(st.integers(0, 30)))
def test_pieces_of_the_order_join_to_the_whole(runs: Tensor, seed: int, start: int, counts: list[int]) -> None:
    pieces: list[int] = []
    for count in counts:
        piece = sample_indices(runs, seed, start + len(pieces), count)
        assert len(piece) == count
        pieces += piece
    assert pieces == sample_indices(runs, seed, start, sum(counts))


@given(runs=LENGTHS, seed=st.integers(0, 99), epochs=st.integers(0, 4))
def test_every_epoch_has_every_sample_once(runs: Tensor, seed: int, epochs: int) -> None:
    num = int(runs[-1])
    found = sample_indices(runs, seed, 0, num * epochs)
    assert [tuple(found[k * num : (k + 1) * num]) for k in range(epochs)] == [
        order(runs, seed, k) for k in range(epochs)
    ]
    assert set(Counter(found).values()) <= {epochs}


def test_the_samples_trained_do_not_depend_on_the_size_of_a_step(llava: Llava) -> None:
    def trained(samples_per_step: int) -> list[int]:
        spec = a_spec(max_steps=None, max_samples=11, samples_per_step=samples_per_step)
        return [k for record in run(llava, spec).records for k in record.samples]

    assert trained(1) == trained(3) == trained(11) == sample_indices(torch.arange(6), 0, 0, 11)


# --------------------------------------------------------------------------------------------- what can be learned


@pytest.mark.parametrize("masked", [[5, IGNORE_INDEX, IGNORE_INDEX], [IGNORE_INDEX] * 3])
def test_a_row_that_supervises_nothing_is_refused(masked: list[int]) -> None:
    ids, good = torch.tensor([5, 6, 7]), torch.tensor([IGNORE_INDEX, 6, 7])
    assert len(collect([ids], [good], [0])) == 1
    with pytest.raises(NothingToLearn, match="sample 1 has no supervised token; leave it out of the training data"):
        collect([ids, ids], [good, torch.tensor(masked)], [0, 0])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_may_be_of_samples_without_a_picture_alone(llava: Llava, precision: str) -> None:
    pictured = samples_of(llava)
    rows = [pictured.of(k) for k in range(5)]
    text = [row[row != llava.processor.image_token_id] for row in (rows[1][0], rows[3][0])]
    images = [*pictured.image.tolist()[:3], NO_PICTURE, NO_PICTURE]
    samples = collect([*(ids for ids, _ in rows[:3]), *text], [*(labels for _, labels in rows[:3]), *text], images)
    training = run(llava, a_spec(max_steps=10, samples_per_step=1, precision=precision), samples=samples)
    assert all(math.isfinite(loss) for loss in training.losses)
    assert [r.grad_norm == 0 for r in training.records] == [r.samples[0] > 2 for r in training.records]


# --------------------------------------------------------------------------------------------- no numbers


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_loss_that_is_no_number_is_skipped_and_counted(llava: Llava, value: float) -> None:
    spec = a_spec(max_steps=5, samples_per_step=1)
    images = samples_of(llava).image
    seen = [int(images[k]) for k in sample_indices(torch.arange(len(images) + 1), spec.seed, 0, 5)]
    training = run(llava, spec, features=bad_pictures(llava, [0], value))
    assert training.skipped == [image == 0 for image in seen]
    assert [math.isfinite(loss) for loss in training.losses] == [image != 0 for image in seen]
    assert (training.place.num_skipped, training.place.num_applied) == (seen.count(0), 5 - seen.count(0))


def test_pixels_that_are_no_numbers_are_skipped_too(llava: Llava) -> None:
    def normalise(pixels: Tensor) -> Tensor:
        black = (pixels == 0).flatten(1).all(1)[:, None, None, None]
        return llava.processor.normalise(pixels).masked_fill(black, math.nan)

    training = Training(llava, a_spec(max_steps=5, samples_per_step=1))
    side = llava.processor.images.side
    pixels = torch.full((3, side, side, 3), 100, dtype=torch.uint8)
    pixels[0] = 0
    computed = Computed(training.model, pixels, normalise, CPU)
    step = make_step(training.model, samples_of(llava), computed, torch.float32, StepSpec())
    training.task = Task(step, computed)
    images = samples_of(llava).image
    assert training.run().skipped == [int(images[record.samples[0]]) == 0 for record in training.records]
    assert training.place.num_skipped == 2


def test_a_skipped_step_changes_nothing(llava: Llava) -> None:
    training = Training(llava, a_spec(max_steps=8, samples_per_step=1, weight_decay=0.1))
    assert training.features is not None
    training.given.features = bad_pictures(llava, [0])
    digests = [training.digest]
    moments = []
    for record, _ in train(training.task, training.learner, training.spec, ALONE, training.place):
        training.records.append(record)
        digests.append(training.digest)
        state = training.learner.optimizer.state
        moments.append({k: v.clone() for p in training.learner.parameters[:1] for k, v in state.get(p, {}).items()})
    assert [one == other for one, other in pairwise(digests)] == training.skipped
    assert 0 < sum(training.skipped) < 8
    for skipped, (before, after) in zip(training.skipped[1:], pairwise(moments), strict=True):
        same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert same == skipped


def test_a_gradient_that_is_no_number_is_skipped_too(llava: Llava) -> None:
    training = Training(llava, a_spec(max_steps=2))
    before = training.digest
    hook_on_gradient(training, no_number)
    with pytest.raises(Diverged, match="none of 2 steps"):
        training.run()
    assert training.skipped == [True, True]
    assert all(math.isfinite(loss) for loss in training.losses)
    assert training.digest == before


def test_five_in_a_row_stop_it_with_a_remedy(llava: Llava) -> None:
    training = Training(llava, a_spec(max_steps=20), features=bad_pictures(llava, [0, 1, 2]))
    before = training.digest
    with pytest.raises(Diverged) as error:
        training.run()
    assert training.skipped == [True] * 5
    assert training.digest == before
    assert "loss nan and gradient norm nan at step 5, the 5th in a row that is no number" in str(error.value)
    assert "lower training.learning_rate (0.01) or set training.precision=fp32" in str(error.value)


def test_four_in_a_row_do_not_stop_it(llava: Llava) -> None:
    training = Training(llava, a_spec(max_steps=6))
    broken = hook_on_gradient(training, no_number)
    for record, _ in train(training.task, training.learner, training.spec, ALONE, training.place):
        training.records.append(record)
        if record.step == 4:
            broken.remove()
    assert training.skipped == [True] * 4 + [False] * 2
    assert training.place.bad_in_a_row == 0


def test_nor_do_many_that_are_not_in_a_row(llava: Llava) -> None:
    training = run(llava, a_spec(max_steps=20, samples_per_step=1), features=bad_pictures(llava, [0]))
    assert sum(training.skipped) == 8  # two of five samples, four epochs: never five in a row


@pytest.mark.parametrize("max_steps", [1, 4])
def test_a_training_that_applied_nothing_has_diverged(llava: Llava, max_steps: int) -> None:
    with pytest.raises(Diverged, match=f"none of {max_steps} steps .* nothing was learned; raise training.max_steps"):
        run(llava, a_spec(max_steps=max_steps), features=bad_pictures(llava, [0, 1, 2]))


# --------------------------------------------------------------------------------------------- the scale of the loss


def test_a_scale_that_is_too_large_is_lowered_and_stops_nothing(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    training = run(llava, a_spec(max_steps=40, precision="fp16"))
    num_skipped = sum(training.skipped)
    assert 5 < num_skipped < 40
    assert training.skipped == [True] * num_skipped + [False] * (40 - num_skipped)
    assert all(math.isfinite(loss) for loss in training.losses)
    assert training.learner.scaler.get_scale() == 2.0 ** (40 - num_skipped)


def test_a_gradient_that_no_scale_can_mend_stops_the_training(llava: Llava) -> None:
    training = Training(llava, a_spec(max_steps=40, precision="fp16"))
    hook_on_gradient(training, no_number)
    with pytest.raises(Diverged, match="gradient norm nan at step 21, the 5th in a row"):
        training.run()
    assert len(training.records) == 16 + 5  # from 65536 to 1 by halves, and five more


def test_a_loss_that_is_no_number_is_no_matter_of_scale(llava: Llava) -> None:
    with pytest.raises(Diverged, match="at step 5, the 5th in a row"):
        run(llava, a_spec(max_steps=20, precision="fp16"), features=bad_pictures(llava, [0, 1, 2]))


@pytest.mark.parametrize(("precision", "scaled"), [("fp16", True), ("bf16", False), ("fp32", False)])
def test_the_loss_is_scaled_in_fp16_alone(llava: Llava, precision: str, scaled: bool) -> None:
    training = run(llava, a_spec(precision=precision))
    assert training.learner.scaler.is_enabled() == scaled
    assert training.learner.scaler.get_scale() == (65536.0 if scaled else 1.0)
    assert all(0 < record.grad_norm < 100 for record in training.records)  # without the scale


# --------------------------------------------------------------------------------------------- memory


def as_on_a_card(tokens: int) -> None:
    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} GiB")


def as_on_the_host(_: int) -> None:
    torch.empty(1 << 50)  # torch's own allocator says what it says


def as_python(_: int) -> None:
    raise MemoryError


class Narrow:
    """A step whose passes run out of memory above so many tokens, on the way forward or back."""

    def __init__(self, step: Step, room: int, fail: Callable[[int], None], backward: bool = False) -> None:
        self.step, self.room, self.fail, self.backward = step, room, fail, backward
        self.samples, self.device = step.samples, step.device
        self.tried: list[int] = []

    def split(self, indices: Sequence[int], most: int) -> list[list[int]]:
        return self.step.split(indices, most)

    def loss(self, indices: Sequence[int], scale: float = 1.0) -> Tensor:
        tokens = self.samples.num_tokens(indices)
        self.tried.append(tokens)
        fails = tokens > self.room
        if fails and not self.backward:
            self.fail(tokens)
        loss = self.step.loss(indices, scale)
        if fails:
            loss.register_hook(lambda _: self.fail(tokens))
        return loss


@pytest.mark.parametrize("fail", [as_on_a_card, as_on_the_host, as_python])
@pytest.mark.parametrize("backward", [False, True])
def test_when_memory_runs_out_passes_shrink_and_steps_stay(
    lively: Llava, fail: Callable[[int], None], backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    spec = a_spec(samples_per_step=5)
    expected = run(lively, spec)
    with caplog.at_level(logging.WARNING, "llava_pipeline"):
        training = run(lively, spec, wrap=lambda step: Narrow(step, 80, fail, backward))
    assert len(training.records) == len(expected.records)
    assert training.losses == pytest.approx(expected.losses, rel=1e-4)
    assert [r.samples for r in training.records] == [r.samples for r in expected.records]
    (warning,) = [record.getMessage() for record in caplog.records]
    total = samples_of(lively).num_tokens(range(5))
    assert warning == (
        f"memory ran out in a pass of {total} tokens; from now on a pass has at most {total // 2}, a step is as large "
        "as before"
    )
    step = training.task.step
    assert isinstance(step, Narrow)
    assert step.tried.count(total) == 1  # never again
    assert {pace.tokens_per_pass for pace in training.paces} == {training.place.tokens_per_pass} == {total // 2}


def test_they_shrink_until_they_fit(lively: Llava) -> None:
    expected = run(lively, a_spec(samples_per_step=5))
    training = run(lively, a_spec(samples_per_step=5), wrap=lambda step: Narrow(step, 49, as_on_a_card))
    assert training.losses == pytest.approx(expected.losses, rel=1e-4)
    assert training.place.tokens_per_pass < 49


def test_what_was_added_before_memory_ran_out_is_not_counted_twice(lively: Llava) -> None:
    class SecondPass(Narrow):
        def loss(self, indices: Sequence[int], scale: float = 1.0) -> Tensor:
            self.tried.append(0)
            if len(self.tried) == 2:
                as_on_a_card(0)
            return self.step.loss(indices, scale)

    expected = run(lively, a_spec(samples_per_step=5), place=Place(tokens_per_pass=80))
    training = run(
        lively, a_spec(samples_per_step=5), place=Place(tokens_per_pass=80),
        wrap=lambda step: SecondPass(step, 0, as_on_a_card),
    )  # fmt: skip
    assert training.losses == pytest.approx(expected.losses, rel=1e-4)
    assert [r.grad_norm for r in training.records] == pytest.approx([r.grad_norm for r in expected.records], rel=1e-3)


def test_a_single_sample_that_does_not_fit_is_told_with_a_remedy(llava: Llava) -> None:
    with pytest.raises(OutOfMemory) as error:
        run(llava, a_spec(samples_per_step=5), wrap=lambda step: Narrow(step, 40, as_on_a_card))
    assert "one sample (49 tokens) takes more memory than there is; lower data.max_tokens" in str(error.value)


def test_another_error_passes(llava: Llava) -> None:
    def fail(_: int) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(llava, a_spec(), wrap=lambda step: Narrow(step, 0, fail))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("no"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


# --------------------------------------------------------------------------------------------- held out, and stopping


def test_the_held_out_loss_is_told_at_its_steps_and_at_the_end(lively: Llava) -> None:
    held_out = samples_of(lively).first(3)
    training = run(lively, a_spec(max_steps=7, held_out_every=3), held_out=held_out)
    told = [record.held_out_loss for record in training.records]
    assert [number + 1 for number, loss in enumerate(told) if loss is not None] == [3, 6, 7]
    step = training.task.held_out
    assert step is not None
    with torch.no_grad():
        last = step.loss([0, 1, 2]).item() / held_out.num_supervised(range(3))
    assert told[-1] == pytest.approx(last, rel=1e-6)


def test_looking_changes_nothing(lively: Llava) -> None:
    with_looks = run(lively, a_spec(held_out_every=1), held_out=samples_of(lively).first(2))
    without = run(lively, a_spec())
    assert with_looks.digest == without.digest
    assert with_looks.losses == without.losses


def test_the_held_out_loss_is_the_same_in_any_number_of_passes(lively: Llava) -> None:
    spec = a_spec(held_out_every=1)
    told = [
        [record.held_out_loss for record in run(lively, spec, held_out=samples_of(lively), place=place_).records]
        for place_ in (Place(), Place(tokens_per_pass=1))
    ]
    assert told[0] == pytest.approx(told[1], rel=1e-4)


def test_asked_to_stop_it_ends_after_the_step_that_runs(llava: Llava) -> None:
    training = Training(llava, a_spec(max_steps=9))
    training.stopped = lambda: True
    training.run()
    assert [record.step for record in training.records] == [1]
    assert training.place.used == Used(1, 4, training.place.used.seconds)
    assert training.place.num_applied == 1


# --------------------------------------------------------------------------------------------- several processes


class Meeting:
    """Where two threads add what they bring."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.brought: list[Any] = [None, None]

    def sum(self, rank: int, value: Tensor) -> Tensor:
        self.brought[rank] = value
        self.barrier.wait()
        total = self.brought[0] + self.brought[1]
        self.barrier.wait()
        return total


@dataclass(frozen=True, slots=True)
class Together(World):
    """One of two processes, as a thread."""

    meeting: Meeting = field(default_factory=Meeting)

    def add(self, values: Sequence[float]) -> list[float]:
        return self.meeting.sum(self.rank, torch.tensor(values, dtype=torch.float64)).tolist()

    def add_gradients(self, parameters: Any) -> None:
        for parameter in parameters:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.meeting.sum(self.rank, own).clone()


def run_two(
    llava: Llava,
    spec: TrainingSpec,
    stopped: Sequence[Callable[[], bool]] = (bool, bool),
    wraps: Sequence[Callable[[Step], Step]] = (lambda step: step, lambda step: step),
    **changes: Any,
) -> list[Training]:
    meeting = Meeting()
    both = [
        Training(llava, spec, world=Together(rank, 2, CPU, meeting), stopped=stop, wrap=wrap, **changes)
        for rank, (stop, wrap) in enumerate(zip(stopped, wraps, strict=True))
    ]
    failures: list[BaseException] = []

    def go(training: Training) -> None:
        try:
            training.run()
        except BaseException as error:
            failures.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=go, args=(training,)) for training in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]
    return both


def test_two_processes_have_the_losses_of_one(lively: Llava) -> None:
    spec = a_spec(max_steps=6, held_out_every=2)
    held_out = samples_of(lively).first(3)
    one = run(lively, spec, held_out=held_out)
    first, second = run_two(lively, spec, held_out=held_out)
    assert first.records == second.records
    assert first.digest == second.digest
    assert first.losses == pytest.approx(one.losses, rel=1e-4)
    assert [r.samples for r in first.records] == [r.samples for r in one.records]
    assert [r.grad_norm for r in first.records] == pytest.approx([r.grad_norm for r in one.records], rel=1e-3)
    assert [r.learning_rate for r in first.records] == [r.learning_rate for r in one.records]
    looks = [[r.held_out_loss for r in training.records if r.held_out_loss is not None] for training in (first, one)]
    assert looks[0] == pytest.approx(looks[1], rel=1e-4)
    assert len(looks[0]) == 3


def test_a_process_without_a_sample_goes_along(lively: Llava) -> None:
    spec = a_spec(max_steps=None, max_samples=5)
    one = run(lively, spec)
    first, second = run_two(lively, spec)
    assert first.records[-1].num_samples == 1
    assert first.records == second.records
    assert first.digest == second.digest
    assert first.losses == pytest.approx(one.losses, rel=1e-4)


def test_no_number_in_one_process_skips_the_step_in_both(lively: Llava) -> None:
    spec = a_spec(max_steps=5, samples_per_step=2)
    features = bad_pictures(lively, [0])
    one = run(lively, spec, features=features)
    first, second = run_two(lively, spec, features=features)
    assert first.skipped == second.skipped == one.skipped
    assert 0 < sum(one.skipped) < 5
    assert first.digest == second.digest


def test_one_process_that_is_asked_to_stop_stops_both(llava: Llava) -> None:
    both = run_two(llava, a_spec(max_steps=9), stopped=(bool, lambda: True))
    assert [len(training.records) for training in both] == [1, 1]
    assert both[0].digest == both[1].digest


def test_one_process_that_runs_out_of_memory_shrinks_its_passes_alone(lively: Llava) -> None:
    one = run(lively, a_spec())
    narrow: Callable[[Step], Step] = lambda step: Narrow(step, 49, as_on_a_card)  # noqa: E731
    first, second = run_two(lively, a_spec(), wraps=(lambda step: step, narrow))
    assert first.records == second.records
    assert first.losses == pytest.approx(one.losses, rel=1e-4)
    assert second.place.tokens_per_pass < first.place.tokens_per_pass == MANY


def test_gradients_are_added_in_one_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged: list[int] = []

    def all_reduce(values: Tensor) -> None:
        exchanged.append(values.numel())
        values.add_(torch.arange(values.numel()))

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    with_gradient, without = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, requires_grad=True)
    with_gradient.grad = torch.ones(2, 3)
    World(0, 2, CPU).add_gradients(iter([with_gradient, without]))
    assert exchanged == [8]
    assert with_gradient.grad.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert without.grad is not None
    assert without.grad.tolist() == [6, 7]
    assert World(0, 2, CPU).add([1.5, 2.0]) == [1.5, 3.0]
    World(0, 1, CPU).add_gradients([with_gradient])
    assert World(0, 1, CPU).add([1.5]) == [1.5]
    assert len(exchanged) == 2


@given(num=st.integers(0, 20), size=st.integers(1, 8))
def test_the_parts_of_all_processes_are_the_step(num: int, size: int) -> None:
    indices = list(range(num))
    parts = [World(rank, size, CPU).part(indices) for rank in range(size)]
    assert sorted(k for part in parts for k in part) == indices
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("meta", None)])
def test_adamw_is_one_kernel_on_a_cpu_and_torchs_own_choice_elsewhere(device: str, expected: bool | None) -> None:
    learned = {"projector.weight": torch.zeros(2, 2, device=device, requires_grad=True)}
    learner = make_learner(learned, TrainingSpec(max_steps=1), torch.float32)
    assert [group["fused"] for group in learner.optimizer.param_groups] == [expected]  # where it is False, torch loops
