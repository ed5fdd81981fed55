"""An ONNX file of a tiny DINOv2, written as torch's exporter writes one: field by field, for that is all it takes."""

from __future__ import annotations

import numpy as np
import torch

FOLDED = (".attention.query.", ".attention.key.", ".attention.value.", ".output.dense.", ".fc1.", ".fc2.")
State = dict[str, torch.Tensor]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, value: torch.Tensor, packed: bool = False) -> bytes:
    """A TensorProto; dimensions one by one or packed, as writers do both."""
    array = value.numpy()
    kind = {np.dtype("f4"): 1, np.dtype("f2"): 10, np.dtype("i8"): 7}[array.dtype]
    dims = field(1, b"".join(map(varint, array.shape))) if packed else b"".join(field(1, n) for n in array.shape)
    return dims + field(2, kind) + field(8, name) + field(9, array.tobytes())


def node(name: str, kind: str, *inputs: str) -> bytes:
    return b"".join(field(1, one) for one in inputs) + field(2, f"{name}_output_0") + field(3, name) + field(4, kind)


def model(*graph: tuple[int, bytes]) -> bytes:
    """A ModelProto of a graph's nodes (1) and initialisers (5)."""
    inside = b"".join(field(number, content) for number, content in graph)
    return field(1, 7) + field(2, "pytorch") + field(7, inside) + field(8, field(2, 14))


def exported(state: State) -> bytes:
    """A checkpoint under ``backbone.``, its matrices folded, beside a head that is not wanted."""
    graph: list[tuple[int, bytes]] = [(5, tensor("decoder.weight", torch.ones(2, 2)))]
    for number, (key, value) in enumerate(state.items()):
        module = "/backbone/" + key.rpartition(".")[0].replace(".", "/")
        if key == "embeddings.position_embeddings":
            for kind, part in (("Concat", value[:, :1]), ("Reshape", value[:, 1:])):
                made_up = f"onnx::{kind}_{number}"
                graph += [
                    (5, tensor(made_up, part.contiguous(), packed=True)),
                    (1, node(f"/backbone/embeddings/{kind}_1", kind, made_up, "other")),
                ]
        elif key.endswith("weight") and any(mark in key for mark in FOLDED):
            made_up = f"onnx::MatMul_{number}"
            graph += [
                (1, node(f"{module}/MatMul", "MatMul", "x", made_up)),
                (5, tensor(made_up, value.T.contiguous())),
            ]
        else:
            graph.append((5, tensor(f"backbone.{key}", value)))
    graph.append((5, tensor("onnx::Unsqueeze_999", torch.tensor([1]))))
    return model(*graph)
