"""Tower features are the same kept or computed, are kept where it pays, and are never taken damaged from the disk."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_pipeline.errors import DamagedArtifact, DiskFull
from llava_pipeline.model.assemble import Llava
from llava_pipeline.spec import StepSpec, TrainingSpec
from llava_pipeline.training import features
from llava_pipeline.training.features import Computed, Kept, bytes_per_picture, compute, keep, make_room, worth_keeping
from llava_pipeline.training.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
NUM = 7
NO_LIMIT = 1e12


@dataclass(frozen=True, slots=True)
class OneOfTwo(World):
    """A process whose fellow is not waited for."""

    waits: list[int] = field(default_factory=list)

    def wait(self) -> None:
        self.waits.append(self.rank)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pictures a file, two a batch."""
    monkeypatch.setattr(features, "FILE_PICTURES", 3)
    monkeypatch.setattr(features, "BATCH_PICTURES", 2)


@pytest.fixture
def pixels(llava: Llava) -> Tensor:
    side = llava.processor.images.side
    generator = torch.Generator().manual_seed(5)
    return torch.randint(256, (NUM, side, side, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures the tower was run on, call by call."""
    counted: list[int] = []
    before = features.tower_features

    def counting(model: Any, pixel_values: Tensor) -> Tensor:
        counted.append(len(pixel_values))
        return before(model, pixel_values)

    monkeypatch.setattr(features, "tower_features", counting)
    return counted


def kept(llava: Llava, pixels: Tensor, folder: Path, allowed: float = NO_LIMIT, world: World = ALONE) -> Kept:
    return keep(llava.model, pixels, llava.processor.normalise, folder, allowed, world)


def computed(llava: Llava, pixels: Tensor) -> Computed:
    return Computed(llava.model, pixels, llava.processor.normalise, CPU)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------- the same features


@pytest.mark.parametrize("images", [[0], [6, 0, 3], [2, 2, 5, 2], list(range(NUM))])
def test_kept_and_computed_features_are_the_same(
    llava: Llava, pixels: Tensor, tmp_path: Path, images: list[int]
) -> None:
    expected = features.tower_features(llava.model, llava.processor.normalise(pixels))[images]
    for source in (kept(llava, pixels, tmp_path / "one"), computed(llava, pixels)):
        source.load(images, [])
        found = source(images)
        assert found.shape == (len(images), llava.processor.num_image_tokens, 32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(source(images[::-1]), found.flip(0))
        assert torch.equal(source([images[0]]), found[:1])


def test_a_step_without_a_picture_needs_none(llava: Llava, pixels: Tensor, tmp_path: Path) -> None:
    for source in (kept(llava, pixels, tmp_path / "one"), computed(llava, pixels)):
        for images in ([1, 2], [], [3]):
            source.load(images, [])
            assert source(images).shape == (len(images), llava.processor.num_image_tokens, 32)


def test_they_are_loaded_before_they_are_asked_for(llava: Llava, pixels: Tensor) -> None:
    source = computed(llava, pixels)
    with pytest.raises(RuntimeError, match="before they were loaded"):
        source([0])
    source.load([1, 2], [])
    with pytest.raises(KeyError):
        source([0])


def test_the_next_pictures_are_read_meanwhile_whatever_comes_then(llava: Llava, pixels: Tensor) -> None:
    source = computed(llava, pixels)
    source.reader = ThreadPoolExecutor(1)  # as where a card computes
    read: list[tuple[int, ...]] = []
    before = source.read
    source.read = lambda images: (read.append(tuple(images)), before(images))[1]  # type: ignore[method-assign]
    source.load([0, 1, 1], [2, 3])
    source.load([2, 3], [4])
    source.load([5, 4], [6])  # not what was announced
    assert source.coming is not None
    source.coming[1].result()
    assert sorted(read) == [(0, 1), (2, 3), (4,), (5, 4), (6,)]  # the reader may be slower than who reads himself
    alone = features.tower_features(llava.model, llava.processor.normalise(pixels[[5, 4]]))
    torch.testing.assert_close(source([5, 4]), alone, rtol=1e-5, atol=1e-6)


def test_on_a_cpu_no_second_thread_takes_part_in_a_step(llava: Llava, pixels: Tensor) -> None:
    source = computed(llava, pixels)
    before = threading.active_count()
    source.load([0, 1], [2, 3])
    source.load([2, 3], [4])
    assert threading.active_count() == before


def test_a_picture_that_comes_twice_in_a_step_is_computed_once(llava: Llava, pixels: Tensor, calls: list[int]) -> None:
    source = computed(llava, pixels)
    source.load([4, 4, 1, 4, 1], [])
    assert sum(calls) == 2


def test_the_tower_runs_in_batches_of_one_size(llava: Llava, pixels: Tensor, calls: list[int]) -> None:
    found = compute(llava.model, pixels, llava.processor.normalise, CPU)
    assert calls == [2, 2, 2, 1]
    assert len(found) == NUM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_features_have_the_precision_and_the_size_that_are_told(
    llava: Llava, pixels: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    llava.model.model.vision_tower.to(dtype)
    source = kept(llava, pixels, tmp_path / "one")
    assert {part.dtype for part in source.files} == {dtype}
    assert sum(part.nbytes for part in source.files) == NUM * bytes_per_picture(llava.model)


# --------------------------------------------------------------------------------------------- whether to keep


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "llava_pipeline"):
        yield caplog


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_steps": 4}, True),  # 16 of 10 samples
        ({"max_steps": 2}, False),
        ({"max_samples": 10}, False),  # each once: the tower would run as often
        ({"max_samples": 11}, True),
        ({"max_steps": 100, "max_samples": 5}, False),
        ({"max_steps": 1, "max_samples": 50}, False),
        ({"max_steps": 100, "max_minutes": 0.001}, True),
        ({"max_steps": 100, "features_gb": 0.0}, False),
        ({"max_steps": 100, "features_gb": 1e-6}, False),
        ({"max_steps": 100, "step": StepSpec(keep_features=False)}, False),
    ],
)
def test_features_are_kept_where_a_picture_is_seen_more_than_once_and_the_disk_may_be_used(
    llava: Llava, pixels: Tensor, changes: dict[str, Any], expected: bool
) -> None:
    spec = TrainingSpec(samples_per_step=4, **changes)
    assert worth_keeping(llava.model, pixels, llava.processor.normalise, spec, 10, CPU) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_minutes": 2.0}, True),  # 7 s of 120 s
        ({"max_minutes": 1.0}, False),
        ({"max_cost": 1.0, "price_per_hour": 30.0}, True),
        ({"max_cost": 1.0, "price_per_hour": 60.0}, False),
        ({"max_minutes": 2.0, "max_cost": 1.0, "price_per_hour": 60.0}, False),
    ],
)
def test_of_a_budget_in_time_they_may_take_a_tenth(
    llava: Llava, pixels: Tensor, changes: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([100.0, 107.0])  # a second a picture
    monkeypatch.setattr(features, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    spec = TrainingSpec(samples_per_step=4, **changes)
    assert worth_keeping(llava.model, pixels, llava.processor.normalise, spec, 10, CPU) == expected


def test_without_pictures_there_is_nothing_to_keep(llava: Llava, pixels: Tensor) -> None:
    spec = TrainingSpec(max_steps=100)
    assert not worth_keeping(llava.model, pixels[:0], llava.processor.normalise, spec, 10, CPU)


def test_the_break_even_is_told(llava: Llava, pixels: Tensor, told: pytest.LogCaptureFixture) -> None:
    for samples in (5, 20):
        spec = TrainingSpec(max_samples=samples)
        worth_keeping(llava.model, pixels, llava.processor.normalise, spec, 10, CPU)
    told_once, told_twice = (record.getMessage() for record in told.records)
    assert told_once == (
        "tower features of 7 pictures are computed for every step: each is used 0.5 times, and it pays from more than "
        "one on"
    )
    assert told_twice.startswith("tower features of 7 pictures are kept (0 MB): each is used 2 times")


# --------------------------------------------------------------------------------------------- on the disk


def test_what_is_there_is_not_computed_again(llava: Llava, pixels: Tensor, tmp_path: Path, calls: list[int]) -> None:
    first = kept(llava, pixels, tmp_path / "one")
    assert sum(calls) == NUM
    again = kept(llava, pixels, tmp_path / "one")
    assert sum(calls) == NUM
    assert all(torch.equal(one, other) for one, other in zip(first.files, again.files, strict=True))
    assert [len(part) for part in first.files] == [3, 3, 1]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_file_is_noticed_and_computed_again(
    llava: Llava, pixels: Tensor, tmp_path: Path, calls: list[int], damage: str, told: pytest.LogCaptureFixture
) -> None:
    first = [part.clone() for part in kept(llava, pixels, tmp_path / "one").files]  # mapped, so they change with it
    names = files_in(tmp_path / "one")
    path = tmp_path / "one" / names[1]
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    path.write_bytes(content[: {"flipped": len(content), "cut": 100, "empty": 0}[damage]])
    calls.clear()
    again = kept(llava, pixels, tmp_path / "one")
    assert sum(calls) == 3  # of this file alone
    assert all(torch.equal(one, other) for one, other in zip(first, again.files, strict=True))
    assert files_in(tmp_path / "one") == names
    assert f"kept features {names[1]} are damaged; they are computed again" in told.text


def test_a_deleted_file_and_one_that_a_kill_left_half_written_are_made_again(
    llava: Llava, pixels: Tensor, tmp_path: Path
) -> None:
    first = kept(llava, pixels, tmp_path / "one")
    names = files_in(tmp_path / "one")
    (tmp_path / "one" / names[0]).unlink()
    (tmp_path / "one" / ".writing-00000-1").write_bytes(b"half")
    again = kept(llava, pixels, tmp_path / "one")
    assert all(torch.equal(one, other) for one, other in zip(first.files, again.files, strict=True))
    assert [name for name in files_in(tmp_path / "one") if not name.startswith(".")] == names


def test_a_full_disk_is_told_and_leaves_nothing_half(
    llava: Llava, pixels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFull):
        kept(llava, pixels, tmp_path / "one")
    assert files_in(tmp_path / "one") == []


def test_two_processes_write_disjoint_files(llava: Llava, pixels: Tensor, tmp_path: Path, calls: list[int]) -> None:
    whole = kept(llava, pixels, tmp_path / "whole")
    calls.clear()
    worlds = [OneOfTwo(rank, 2, CPU) for rank in (0, 1)]
    with pytest.raises(DamagedArtifact, match=r"kept features 1 in .* are gone"):  # nobody else is here to make them
        kept(llava, pixels, tmp_path / "parts", world=worlds[0])
    assert [name[:5] for name in files_in(tmp_path / "parts")] == ["00000", "00002"]
    assert sum(calls) == 4
    second = kept(llava, pixels, tmp_path / "parts", world=worlds[1])
    assert sum(calls) == NUM
    assert files_in(tmp_path / "parts") == files_in(tmp_path / "whole")
    assert all(torch.equal(one, other) for one, other in zip(whole.files, second.files, strict=True))


# --------------------------------------------------------------------------------------------- the allowance


def a_set(folder: Path, num_bytes: int, age: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "00000-0.safetensors").write_bytes(bytes(num_bytes))
    os.utime(folder, (1e9 - age, 1e9 - age))
    return folder


@pytest.mark.parametrize(
    ("allowed", "left"),
    [
        (1000.0, ["old", "older", "oldest"]),
        (600.0, ["old", "older", "oldest"]),
        (599.0, ["old", "older"]),
        (250.0, ["old"]),
        (99.0, []),
        (-5.0, []),
    ],
)
def test_features_of_other_data_make_room_the_longest_unused_first(
    tmp_path: Path, allowed: float, left: list[str]
) -> None:
    for name, size, age in (("old", 100, 1), ("oldest", 300, 3), ("older", 200, 2)):
        a_set(tmp_path / name, size, age)
    own = a_set(tmp_path / "own", 5000, 9)
    make_room(own, allowed)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*left, "own"])
    assert files_in(own) == ["00000-0.safetensors"]
    assert own.stat().st_mtime > 1e9  # used now


def test_what_is_kept_now_counts_against_the_allowance(llava: Llava, pixels: Tensor, tmp_path: Path) -> None:
    other = a_set(tmp_path / "other", 1000, 1)
    needed = NUM * bytes_per_picture(llava.model)
    kept(llava, pixels, tmp_path / "one", needed + 1000)
    assert other.exists()
    kept(llava, pixels, tmp_path / "two", needed + 999)
    assert not other.exists()
    assert not (tmp_path / "one").exists()
    assert len(files_in(tmp_path / "two")) == 3
