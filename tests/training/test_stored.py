"""Snapshots and checkpoints larger than memory: rows are read when they are used, tensors written one at a time."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from llava_pipeline.contracts import ArtifactRef
from llava_pipeline.model.processor import Processor
from llava_pipeline.spec import StepSpec
from llava_pipeline.store import open_artifact, writing
from llava_pipeline.training.job import PIXELS, TOKENS
from llava_pipeline.training.samples import collect
from llava_pipeline.training.stored import DTYPES, Stored, in_order, write_tensors
from tests.training.job import Make, samples_artifact, train

MB = 1_000_000


def resident(kind: str = "VmRSS") -> int:
    """Bytes of this process, mapped files included."""
    return int(Path("/proc/self/status").read_text(encoding="utf-8").split(f"{kind}:")[1].split()[0]) * 1024


def a_large_file(path: Path, rows: int, side: int) -> None:
    """Black pictures (rows, side, side, 3), which take no room on the disk."""
    size = rows * side * side * 3
    header = json.dumps({"pixels": {"dtype": "U8", "shape": [rows, side, side, 3], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_are_those_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    save_file({"other": torch.ones(3), "rows": values}, tmp_path / "file")
    rows = Stored(tmp_path / "file", "rows")
    assert len(rows) == 7
    for index in ([5, 0, 5], [], slice(2, 5), slice(4), slice(5, 100), slice(3, 3)):
        assert torch.equal(rows[index], values[index]), index


def test_a_file_that_was_cut_is_told(tmp_path: Path) -> None:
    a_large_file(tmp_path / "file", 10, 4)
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-20])
    rows = Stored(tmp_path / "file", "pixels")
    assert len(rows[[8]]) == 1
    with pytest.raises(OSError, match="ends before its row 9"):
        rows[[9]]


def test_reading_all_of_a_large_file_takes_no_memory(tmp_path: Path) -> None:
    a_large_file(tmp_path / "file", 1400, 224)
    rows = Stored(tmp_path / "file", "pixels")
    assert not rows[list(range(50))].any()
    before = resident()
    assert not any(rows[list(range(start, start + 50))].any() for start in range(0, 1400, 50))
    assert resident() - before < 50 * MB < 200 * MB < (tmp_path / "file").stat().st_size


def test_what_is_found_out_of_tokens_takes_little_memory() -> None:
    """Eight million tokens: one number for each would be 64 MB, and several are needed of each."""
    length, num = 200, 40_000
    ids, labels = torch.ones(length * num, dtype=torch.int32), torch.ones(length * num, dtype=torch.int32)
    samples = collect([ids], [labels], [0])
    samples = type(samples)(ids, labels, torch.arange(num + 1) * length, torch.zeros(num, dtype=torch.int64))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = resident("VmHWM")
    assert samples.supervised == [length - 1] * num
    assert samples.last_predictor == [length - 2] * num
    assert samples.have_token(1).all()
    assert not samples.have_token(2).any()
    assert resident("VmHWM") - before < 100 * MB


def larger_than(processor: Processor, num_bytes: int, count: int) -> ArtifactRef:
    """Samples about pictures spread over a file of this size."""
    side = processor.images.side
    rows = num_bytes // (side * side * 3)
    small = open_artifact(samples_artifact(processor, count))
    tokens = load((small / TOKENS).read_bytes())
    tokens["image"] = torch.where(tokens["image"] < 0, -1, torch.arange(count) * (rows // count))
    with writing("samples") as (folder, done):
        save_file(tokens, folder / TOKENS)
        a_large_file(folder / PIXELS, rows, side)
    return done[0]


def test_a_snapshot_larger_than_memory_is_trained_on(make: Make, out: Path, processor: Processor) -> None:
    """800 MB of pictures in a process that may have 400 MB more than it begins with."""
    changes: dict[str, Any] = {"max_steps": 4, "step": StepSpec(keep_features=False)}
    job = make({"train": larger_than(processor, 800 * MB, 40), "held_out": None}, **changes)
    trainer = train(job, out, faults=[("limit_memory", 400 * MB)])
    assert trainer.steps == [1, 2, 3, 4]
    assert trainer.notes() == []


def test_tensors_are_written_one_at_a_time(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.arange(5, dtype=torch.uint8), "half": torch.randn(3, 3).bfloat16(), "none": torch.zeros(0, 4),
        "number": torch.tensor(2.5), "turned": torch.randn(4, 6).T, "wide": torch.arange(3, dtype=torch.int64),
    }  # fmt: skip
    asked: list[int] = []

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(tensor.numel())
        return tensor

    file = io.BytesIO()
    write_tensors(file, tensors, whole)
    found = load(file.getvalue())
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    assert asked == [value.numel() for value in in_order(tensors).values()]
