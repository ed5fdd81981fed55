"""Weights of an ONNX file, under the names that the exported torch module has for them.

torch's exporter keeps the names of most parameters. Those of matrix products it folds: a weight is stored transposed,
under a name of its own, and only the node that reads it tells whose it was. The file is a protobuf message; of its
dozens of kinds of fields a handful is read here, which takes no further dependency.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llava_pipeline.errors import WeightsMismatch

Array = np.ndarray[Any, np.dtype[Any]]
GRAPH, NODE, INITIALIZER = 7, 1, 5  # numbers of the fields in onnx.proto: of a model, and of its graph
NODE_INPUT, NODE_NAME, NODE_KIND = 1, 3, 4
TENSOR_DIMS, TENSOR_TYPE, TENSOR_FLOATS, TENSOR_NAME, TENSOR_RAW = 1, 2, 4, 8, 9
TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2"), 11: np.dtype("<f8")}
FOLDED = "onnx::"  # how the names begin that the exporter makes up
# DINOv2's positions are taken apart, those of the class token and those of the patches, before the exporter sees them.
JOINED = {"embeddings.position_embeddings": ("embeddings.Concat", "embeddings.Reshape")}


def read_onnx(path: Path, prefix: str = "") -> dict[str, Array]:
    """The floating-point weights of a file whose names begin with ``prefix``, which is dropped.

    Raises:
        WeightsMismatch: it is damaged, or no ONNX file, or has no such weights, or keeps them in other files.
    """
    try:
        weights = _named(memoryview(path.read_bytes()))
    except (IndexError, ValueError, KeyError, StopIteration) as error:
        raise WeightsMismatch(
            f"cannot read weights from {path.name} ({type(error).__name__}: {error}); it is damaged or no ONNX file: "
            "fetch it again with --refresh, or name another weight file"
        ) from error
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not found:
        tops = ", ".join(sorted({name.split(".")[0] for name in weights})[:5]) or "nothing"
        raise WeightsMismatch(f"{path.name} has no weights that begin with {prefix!r}, but {tops}; correct `prefix`")
    for whole, parts in JOINED.items():
        if all(part in found for part in parts):
            found[whole] = np.concatenate([found.pop(part) for part in parts], 1)
    return found


def _named(content: memoryview) -> dict[str, Array]:
    """Every floating-point initialiser by the name of the parameter that it was."""
    graph = next(value for number, value in _fields(content) if number == GRAPH)
    tensors: dict[str, Array] = {}
    readers: dict[str, tuple[str, str]] = {}  # of a tensor, the first node that reads it: its name and its kind
    for number, value in _fields(graph):
        if number == INITIALIZER:
            name, tensor = _tensor(value)
            if tensor is not None:
                tensors[name] = tensor
        elif number == NODE:
            node = [(field, bytes(text).decode()) for field, text in _fields(value) if field in (1, 3, 4)]
            name, kind = dict(node).get(NODE_NAME, ""), dict(node).get(NODE_KIND, "")
            for field, text in node:
                if field == NODE_INPUT:
                    readers.setdefault(text, (name, kind))
    named = {}
    for name, tensor in tensors.items():
        if name.startswith(FOLDED) and name in readers:
            node_name, kind = readers[name]
            module = node_name.strip("/").rpartition("/")[0].replace("/", ".")
            if kind == "MatMul":
                name, tensor = f"{module}.weight", np.ascontiguousarray(tensor.T)
            else:
                name = f"{module}.{kind}"
        named[name] = tensor
    return named


def _tensor(content: memoryview) -> tuple[str, Array | None]:
    """Name and values; None for whole numbers, which are no weights."""
    fields = list(_fields(content))
    one = dict(fields)
    name = bytes(one[TENSOR_NAME]).decode()
    if one[TENSOR_TYPE] not in TYPES:
        return name, None
    raw = one.get(TENSOR_RAW, one.get(TENSOR_FLOATS))
    if raw is None:
        raise ValueError(f"{name} is kept in another file")
    shape = [size for number, value in fields if number == TENSOR_DIMS for size in _sizes(value)]
    return name, np.frombuffer(raw, TYPES[one[TENSOR_TYPE]]).reshape(shape)


def _sizes(value: Any) -> Iterator[int]:
    """Dimensions, one by one or packed behind each other."""
    if isinstance(value, int):
        yield value
        return
    place = 0
    while place < len(value):
        size, place = _varint(value, place)
        yield size


def _fields(content: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a protobuf message: a whole number, or bytes."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(content, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(content, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        if place + length > len(content):
            raise ValueError(f"it ends at byte {len(content)}, within a field of {length} bytes")
        yield number, content[place : place + length]
        place += length


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    """A whole number in groups of seven bits, and the place behind it."""
    value = shift = 0
    while True:
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError(f"a number without end at byte {place}")
