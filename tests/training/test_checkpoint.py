"""A checkpoint is whole or it is not there, and what was written is read back bit by bit."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava_pipeline.errors import DiskFull
from llava_pipeline.training import checkpoint
from llava_pipeline.training.checkpoint import NUM_KEPT, STATE, TENSORS, newest, read, sweep, write
from tests.training.job import SAVING, die_at_line

MANIFEST = "MANIFEST.json"
FILES = [TENSORS, STATE, MANIFEST]


def state_of(step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Something to keep."""
    return {"weight": torch.full((3, 2), float(step)), "step": torch.tensor(step)}, {"step": step, "rate": 0.1 * step}


def put(folder: Path, *steps: int) -> list[Path]:
    """Checkpoints of these steps."""
    return [write(folder, step, *state_of(step)) for step in steps]


def step_of(folder: Path) -> int | None:
    """Of the newest one that is whole."""
    found = newest(folder)
    if found is None:
        return None
    tensors, state = found
    step = int(state["step"])
    expected, told = state_of(step)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert state == told
    return step


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --------------------------------------------------------------------------------------------- written and read

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits of any type, in any small shape, not always contiguous."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    seed = draw(st.integers(0, 2**32))
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    tensor = (raw % 2 == 0) if dtype == torch.bool else raw.view(dtype)
    tensor = tensor.reshape(shape)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(names, tensors(), max_size=4), st.dictionaries(st.text(), json_values, max_size=4))
def test_what_is_written_is_read_back_bit_by_bit(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        found = read(write(Path(name), 7, tensors, state))
    assert found is not None
    assert found[0].keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (found[0][key].dtype, found[0][key].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[0][key]) == bits(tensor)
    assert found[1] == state


def test_the_same_state_is_the_same_bytes(tmp_path: Path) -> None:
    first, second = put(tmp_path / "a", 3) + put(tmp_path / "b", 3)
    assert [(first / name).read_bytes() for name in FILES] == [(second / name).read_bytes() for name in FILES]


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    put(tmp_path, *range(1, 8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000006", "000000007"]
    assert NUM_KEPT == 2


@pytest.mark.parametrize("steps", [(9, 10), (99_999, 100_000), (99_999_999, 100_000_000)])
def test_the_newest_is_the_one_of_the_last_step(tmp_path: Path, steps: tuple[int, int]) -> None:
    put(tmp_path, *steps)
    assert step_of(tmp_path) == steps[1]


def test_without_any_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None


def test_what_is_no_checkpoint_is_let_be(tmp_path: Path) -> None:
    put(tmp_path, 1)
    (tmp_path / "9.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "notes").mkdir()
    put(tmp_path, 2, 3)
    assert step_of(tmp_path) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"000000002", "000000003", "9.txt", "notes"}


def test_one_that_is_written_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    (path,) = put(tmp_path, 4)
    (path / STATE).write_text("{}", encoding="utf-8")
    put(tmp_path, 4)
    assert step_of(tmp_path) == 4


def test_the_manifest_is_written_last_and_everything_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    moved: list[int] = []
    fsync, replace = os.fsync, Path.replace

    def watched(number: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    def watched_move(self: Path, target: Path) -> Path:
        moved.append(len(flushed))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(Path, "replace", watched_move)
    put(tmp_path, 1)
    assert flushed == [*FILES, f".writing-{os.getpid()}", tmp_path.name]
    assert moved == [4]  # after all files and their folder


# --------------------------------------------------------------------------------------------- damaged


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def damages() -> list[Any]:
    """Every file lost, emptied, cut, flipped at its begin, middle and end, or replaced; files added; all lost."""
    found: list[Any] = []
    for name in FILES:
        found.append(pytest.param(lambda folder, name=name: (folder / name).unlink(), id=f"{name} lost"))
        found.append(pytest.param(overwrite(name, b""), id=f"{name} empty"))
        found.append(pytest.param(overwrite(name, b"\xff\xfe"), id=f"{name} of bytes"))
        found.append(pytest.param(overwrite(name, b"[]"), id=f"{name} of other JSON"))

        def cut(folder: Path, name: str = name) -> None:
            os.truncate(folder / name, (folder / name).stat().st_size - 1)

        def to_folder(folder: Path, name: str = name) -> None:
            (folder / name).unlink()
            (folder / name).mkdir()

        found += [pytest.param(cut, id=f"{name} cut"), pytest.param(to_folder, id=f"{name} a folder")]
        for where in (0.0, 0.5, 0.999):

            def flip(folder: Path, name: str = name, where: float = where) -> None:
                content = bytearray((folder / name).read_bytes())
                content[int(len(content) * where)] ^= 4
                (folder / name).write_bytes(content)

            found.append(pytest.param(flip, id=f"{name} flipped at {where}"))
    found.append(pytest.param(lambda folder: (folder / "more").write_bytes(b"x"), id="a file too many"))
    found.append(pytest.param(lambda folder: [path.unlink() for path in folder.iterdir()], id="all lost"))
    return found


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_one_is_told_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    _, last = put(tmp_path, 1, 2)
    damage(last)
    with caplog.at_level("WARNING", logger="llava_pipeline"):
        assert step_of(tmp_path) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("checkpoint 000000002 is damaged (")
    assert record.getMessage().endswith("); the one before it is used")


def test_with_all_damaged_there_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in put(tmp_path, 1, 2):
        (path / TENSORS).unlink()
    with caplog.at_level("WARNING", logger="llava_pipeline"):
        assert newest(tmp_path) is None
    assert len(caplog.records) == 2


def test_a_new_one_is_kept_where_later_ones_are_damaged(tmp_path: Path) -> None:
    for path in put(tmp_path, 8, 9):
        (path / TENSORS).unlink()
    put(tmp_path, 3)
    assert step_of(tmp_path) == 3
    put(tmp_path, 4)
    assert step_of(tmp_path) == 4


# --------------------------------------------------------------------------------------------- killed, full


def write_and_die(folder: Path, step: int, line: int) -> int:
    """Write in a process of its own that is killed at a line; the signal, or 0 where it came to the end."""
    if (child := os.fork()) == 0:
        try:
            die_at_line(SAVING, line)
            put(folder, step)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)], ids=["some lines", "every line"])
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "in place of a damaged one"])
def test_killed_at_any_line_it_leaves_the_old_or_the_new(tmp_path: Path, again: bool, stride: int) -> None:
    first = tmp_path / "first"
    _, last = put(first, 1, 2)
    if again:
        (last / STATE).unlink()
    old, new = (1, 2) if again else (2, 3)
    seen = set()
    for line in range(1, 400, stride):
        folder = tmp_path / str(line)
        shutil.copytree(first, folder)
        if write_and_die(folder, new, line) == 0:
            break
        step = step_of(folder)
        assert step in (old, new), line
        seen.add(step)
        sweep(folder)
        assert not list(folder.glob(".writing-*"))
        put(folder, new + 1)
        assert step_of(folder) == new + 1
        assert len(list(folder.iterdir())) == NUM_KEPT
        shutil.rmtree(folder)
    else:
        raise AssertionError("it never came to the end")
    assert line > 60
    assert seen == {old, new}


@pytest.mark.parametrize("call", range(5))
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_is_full_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, number: int
) -> None:
    put(tmp_path, 1, 2)
    fsync, calls = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    kind = OSError if number == errno.EIO else DiskFull
    with pytest.raises(kind, match="no space left below" if kind is DiskFull else "Input/output"):
        put(tmp_path, 3)
    assert not list(tmp_path.glob(".writing-*"))
    assert step_of(tmp_path) in (2, 3)


def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DiskFull, match="free some, or point LLAVA_PIPELINE_HOME at a larger disk"):
        put(tmp_path / "checkpoints", 1)


def test_sweeping_removes_what_was_half_written_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path, 1, 2)
    for number in (3, 2**20):
        half = tmp_path / f".writing-{number}"
        half.mkdir()
        (half / TENSORS).write_bytes(b"half")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000001", "000000002"]
    sweep(tmp_path / "nowhere")


def test_a_half_written_one_is_never_read(tmp_path: Path) -> None:
    (path,) = put(tmp_path, 5)
    shutil.copytree(path, tmp_path / ".writing-1")
    shutil.rmtree(path)
    assert newest(tmp_path) is None


def test_reading_needs_no_pickle(tmp_path: Path) -> None:
    (path,) = put(tmp_path, 1)
    assert {file.name for file in path.iterdir()} == set(FILES)
    assert json.loads((path / MANIFEST).read_text(encoding="utf-8")).keys() == {TENSORS, STATE}
    assert "pickle" not in Path(checkpoint.__file__).read_text(encoding="utf-8")


def test_a_kill_is_a_kill(tmp_path: Path) -> None:
    """What the claims above rest on."""
    assert write_and_die(tmp_path, 1, 3) == -signal.SIGKILL
    assert write_and_die(tmp_path, 1, 10_000) == 0
