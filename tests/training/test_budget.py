"""A budget stops the training, and the learning rate follows the share of it that is used: it ends where it should."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from llava_pipeline.spec import TrainingSpec
from llava_pipeline.training.budget import Used, end_of_next, learning_rate, next_samples, share
from llava_pipeline.training.loop import Place, StepRecord, Task, make_learner, train
from llava_pipeline.training.samples import Samples, collect
from llava_pipeline.training.world import World

CPU = torch.device("cpu")
PEAK, FLOOR = 2e-4, 2e-5


def a_spec(**changes: Any) -> TrainingSpec:
    return TrainingSpec(**({"samples_per_step": 4, "device": "cpu"} | changes))


def rates(num_steps: int, **changes: Any) -> list[float]:
    """Of every step of a training of so many."""
    spec = a_spec(max_steps=num_steps, **changes)
    return [learning_rate(spec, end_of_next(spec, Used(steps, 4 * steps), 0.0)) for steps in range(num_steps)]


# --------------------------------------------------------------------------------------------- a loop without a model


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Timed:
    """A step that learns one number, and takes as long as it is told to."""

    def __init__(self, durations: list[float], clock: Clock) -> None:
        self.number = nn.Parameter(torch.zeros(()))
        self.durations, self.clock, self.device = durations, clock, CPU
        self.num = 0
        ids = torch.arange(3)
        self.samples: Samples = collect([ids] * 5, [ids] * 5, [-1] * 5)

    def split(self, indices: list[int], most: int) -> list[list[int]]:
        return [list(indices)]

    def loss(self, indices: list[int], scale: float = 1.0) -> Tensor:
        self.clock.now += self.durations[self.num % len(self.durations)]
        self.num += 1
        return (self.number - 1) ** 2 * len(indices)


class NoFeatures:
    def load(self, images: Any, following: Any) -> None:
        assert not images

    def __call__(self, images: list[int]) -> Tensor:
        raise AssertionError("there are no pictures")


def run(spec: TrainingSpec, durations: list[float], place: Place | None = None) -> tuple[list[StepRecord], Place]:
    """A training whose steps take so many seconds."""
    clock = Clock()
    step, place = Timed(durations, clock), place or Place()
    learner = make_learner({"number": step.number}, spec, torch.float32)
    training = train(Task(step, NoFeatures()), learner, spec, World(0, 1, CPU), place, clock)
    return [record for record, _ in training], place


# --------------------------------------------------------------------------------------------- the rate


@pytest.mark.parametrize("num_steps", [2, 3, 7, 20, 350])
@pytest.mark.parametrize("warmup_share", [0.0, 0.05, 0.3])
def test_the_last_step_has_exactly_the_floor(num_steps: int, warmup_share: float) -> None:
    assert rates(num_steps, warmup_share=warmup_share)[-1] == FLOOR


def test_it_warms_up_linearly_from_the_first_step() -> None:
    found = rates(400, warmup_share=0.05)
    assert found[:20] == pytest.approx([PEAK * (step + 1) / 20 for step in range(20)])
    assert found[19] == max(found) == PEAK


def test_it_is_halfway_down_in_the_middle_of_the_cosine() -> None:
    assert rates(110, warmup_share=10 / 110)[9 + 50] == pytest.approx((PEAK + FLOOR) / 2)


def test_it_is_the_cosine_that_is_known() -> None:
    found = rates(100, warmup_share=0.0, min_learning_rate=0.0)
    assert found == pytest.approx([PEAK * (1 + math.cos(math.pi * (step + 1) / 100)) / 2 for step in range(100)])


def test_a_constant_rate_stays_after_the_warm_up() -> None:
    found = rates(100, warmup_share=0.1, schedule="constant")
    assert found[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])
    assert set(found[10:]) == {PEAK}


@given(num_steps=st.integers(1, 400), warmup=st.floats(0, 0.99), floor=st.floats(0, PEAK))
def test_it_climbs_to_the_peak_then_falls_to_the_floor(num_steps: int, warmup: float, floor: float) -> None:
    found = rates(num_steps, warmup_share=warmup, min_learning_rate=floor)
    climbing = sum((step + 1) / num_steps < warmup for step in range(num_steps))
    assert found[:climbing] == sorted(found[:climbing])
    assert found[climbing:] == sorted(found[climbing:], reverse=True)
    assert found[-1] == pytest.approx(floor, abs=1e-18)
    assert all(rate >= floor - 1e-18 for rate in found[climbing:])


@given(used=st.floats(0, 2), warmup=st.floats(0, 0.99), floor=st.floats(0, PEAK), constant=st.booleans())
def test_it_lies_between_nothing_and_the_peak(used: float, warmup: float, floor: float, constant: bool) -> None:
    schedule = "constant" if constant else "cosine"
    spec = a_spec(max_steps=1, warmup_share=warmup, min_learning_rate=floor, schedule=schedule)
    assert 0 <= learning_rate(spec, used) <= PEAK * (1 + 1e-12)


# --------------------------------------------------------------------------------------------- the share


BUDGETS = st.fixed_dictionaries(
    {},
    optional={
        "max_steps": st.integers(1, 1000),
        "max_samples": st.integers(1, 1000),
        "max_minutes": st.floats(0.01, 1000),
        "max_cost": st.floats(0.01, 1000),
    },
).filter(bool)
USED = st.builds(Used, st.integers(0, 2000), st.integers(0, 2000), st.floats(0, 1e5))


@given(budgets=BUDGETS, used=USED, more=USED)
def test_the_share_grows_with_everything_that_is_used(budgets: dict[str, Any], used: Used, more: Used) -> None:
    spec = a_spec(price_per_hour=2.0, **budgets)
    later = Used(used.steps + more.steps, used.samples + more.samples, used.seconds + more.seconds)
    assert 0 <= share(spec, used) <= share(spec, later)


@given(budgets=BUDGETS, used=USED, seconds=st.floats(0, 100))
def test_the_end_of_a_step_is_not_before_its_beginning(budgets: dict[str, Any], used: Used, seconds: float) -> None:
    spec = a_spec(price_per_hour=2.0, **budgets)
    if share(spec, used) < 1:
        assert share(spec, used) - 1e-12 <= end_of_next(spec, used, seconds) <= 1


@given(budgets=BUDGETS, used=USED)
def test_of_several_budgets_the_one_nearest_to_its_end_counts(budgets: dict[str, Any], used: Used) -> None:
    whole = share(a_spec(price_per_hour=2.0, **budgets), used)
    assert whole == max(share(a_spec(price_per_hour=2.0, **{name: value}), used) for name, value in budgets.items())


def test_shares_of_each_budget() -> None:
    used = Used(steps=5, samples=30, seconds=900.0)
    assert share(a_spec(max_steps=20), used) == 0.25
    assert share(a_spec(max_samples=40), used) == 0.75
    assert share(a_spec(max_minutes=30.0), used) == 0.5
    assert share(a_spec(max_cost=2.0, price_per_hour=4.0), used) == 0.5  # a quarter of an hour for 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "set a budget: max_steps, max_samples, max_minutes or max_cost"),
        ({"max_cost": 1.0}, "max_cost needs the machine.s price"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_minutes": math.inf}, "max_minutes"),
        ({"max_minutes": 0}, "max_minutes"),
        ({"max_steps": 1, "price_per_hour": -1.0}, "price_per_hour"),
    ],
)
def test_a_training_without_an_end_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        a_spec(**changes)


# --------------------------------------------------------------------------------------------- where it ends


def test_steps_are_counted() -> None:
    records, place = run(a_spec(max_steps=7), [1.0])
    assert len(records) == place.used.steps == 7
    assert [record.learning_rate for record in records] == rates(7)


@pytest.mark.parametrize(("max_samples", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3]), (1, [1])])
def test_of_samples_the_last_step_takes_what_is_left(max_samples: int, sizes: list[int]) -> None:
    records, place = run(a_spec(max_samples=max_samples, warmup_share=0.0), [1.0])
    assert [record.num_samples for record in records] == sizes
    assert place.used.samples == max_samples
    assert records[-1].learning_rate == FLOOR


@given(max_samples=st.integers(1, 50), used=st.integers(0, 49))
def test_a_step_never_takes_more_samples_than_are_left(max_samples: int, used: int) -> None:
    if used < max_samples:
        count = next_samples(a_spec(max_samples=max_samples), Used(samples=used))
        assert 0 < count <= min(4, max_samples - used)
    assert next_samples(a_spec(max_steps=1), Used(samples=used)) == 4


@settings(deadline=None, max_examples=50)
@given(durations=st.lists(st.floats(0.7, 1.3), min_size=1, max_size=20), seconds=st.floats(6, 60))
def test_minutes_end_within_a_step_and_at_the_floor_however_irregular(durations: list[float], seconds: float) -> None:
    records, place = run(a_spec(max_minutes=seconds / 60), durations)
    assert seconds <= place.used.seconds + 1e-6
    assert place.used.seconds <= seconds + 1.3
    assert records[-1].learning_rate == FLOOR
    found = [record.learning_rate for record in records]
    peak = found.index(max(found))
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_regular_steps_have_nearly_the_rates_of_so_many_steps() -> None:
    records, _ = run(a_spec(max_minutes=100.5 / 60), [1.0])
    assert len(records) == 101
    # the first does not know yet how long a step takes
    assert [record.learning_rate for record in records][1:] == pytest.approx(rates(101)[1:], abs=0.02 * PEAK)


def test_one_very_long_step_ends_the_training_when_it_is_done() -> None:
    records, place = run(a_spec(max_minutes=1.0), [1.0, 1.0, 1000.0])
    assert len(records) == 3
    assert place.used.seconds == 1002.0


def test_money_is_the_price_of_the_time() -> None:
    records, place = run(a_spec(max_cost=0.5, price_per_hour=36.0), [1.0])  # a hundredth a second
    assert len(records) == 50
    assert place.used.seconds == 50.0
    assert records[-1].learning_rate == FLOOR


@pytest.mark.parametrize(
    ("budgets", "steps"),
    [
        ({"max_steps": 3, "max_samples": 100, "max_minutes": 1.0}, 3),
        ({"max_steps": 30, "max_samples": 18, "max_minutes": 1.0}, 5),
        ({"max_steps": 30, "max_samples": 100, "max_minutes": 0.2}, 12),
        ({"max_minutes": 1.0, "max_cost": 0.0699, "price_per_hour": 36.0}, 7),
    ],
)
def test_of_several_budgets_the_first_to_end_stops_it(budgets: dict[str, Any], steps: int) -> None:
    records, _ = run(a_spec(warmup_share=0.0, **budgets), [1.0])
    assert len(records) == steps
    assert records[-1].learning_rate == FLOOR


def test_the_time_of_earlier_attempts_counts() -> None:
    records, place = run(a_spec(max_minutes=1.0), [1.0], Place(used=Used(40, 160, 50.0), step_seconds=1.0))
    assert [record.step for record in records] == list(range(41, 51))
    assert place.used.seconds == 60.0
    assert records[0].learning_rate == pytest.approx(learning_rate(a_spec(max_minutes=1.0), 51 / 60))


def test_what_is_used_up_already_trains_no_more() -> None:
    place = Place(used=Used(4, 16, 4.0), num_applied=4)
    records, after = run(a_spec(max_steps=4), [1.0], place)
    assert records == []
    assert after.used == Used(4, 16, 4.0)


def test_the_first_step_of_a_timed_training_learns_something() -> None:
    records, _ = run(a_spec(max_minutes=1.0), [1.0])
    assert records[0].learning_rate > 0
