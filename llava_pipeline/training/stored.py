"""safetensors files that may be larger than memory: written one tensor at a time, read a few rows at a time.

A file that is mapped into memory counts as the process's own for every page that was once read; what is read here is
gone when it is used.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored:
    """The rows (N, ...) of one tensor of a file, indexed by a slice of step 1 or by several numbers."""

    def __init__(self, path: Path, name: str) -> None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            about = json.loads(file.read(size))[name]
        self.path, self.file = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        self.shape, self.dtype = torch.Size(about["shape"]), DTYPES[about["dtype"]]
        self.begin = 8 + size + about["data_offsets"][0]
        self.row_bytes = self.dtype.itemsize * self.shape[1:].numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | Sequence[int]) -> Tensor:
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            rows = torch.empty(max(0, stop - start), *self.shape[1:], dtype=self.dtype)
            self._read(rows, start)
            return rows
        rows = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
        for row, number in zip(rows, index, strict=True):
            self._read(row, number)
        return rows

    def _read(self, into: Tensor, row: int) -> None:
        left = _bytes(into)
        place = self.begin + row * self.row_bytes
        while left:
            if not (count := os.preadv(self.file, [left], place)):
                raise OSError(f"{self.path} ends before its row {row}")
            left, place = left[count:], place + count


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    metadata: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write tensors in safetensors' format, those of wide numbers first; each is made ``whole``, on the host, when it
    is its turn.

    Raises:
        OSError: no space is left; safetensors' own writer tells that as another error.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    place = 0
    tensors = in_order(tensors)
    for name, tensor in tensors.items():
        end = place + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(_bytes(whole(tensor).contiguous()))


def in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they are written: every number then lies at a multiple of its size."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


def _bytes(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return view
