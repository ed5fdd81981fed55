"""A folder laid out as the hub lays the repositories of the profile ``budget``, with tiny random weights."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import CLIPConfig, CLIPModel

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.data import scenes
from llava_pipeline.data.record import Row
from llava_pipeline.spec import load_spec
from llava_pipeline.store import open_artifact

ITEM = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
VSFT = pa.schema([
    ("messages", pa.list_(pa.struct([("content", pa.list_(ITEM)), ("role", pa.string())]))),
    ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
])  # fmt: skip


def vsft_row(number: int) -> Row:
    """A row as ``HuggingFaceH4/llava-instruct-mix-vsft`` has them: there the picture may stand after the text."""
    items = [
        {"index": None, "text": f"What is number {number}?\n", "type": "text"},
        {"index": 0, "text": None, "type": "image"},
    ]
    answer = {"index": None, "text": f"number {number}", "type": "text"}
    messages = [{"content": items, "role": "user"}, {"content": [answer], "role": "assistant"}]
    picture = scenes.draw(scenes.scene_at(0, "train", number)[0])
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return {"messages": messages, "images": [{"bytes": buffer.getvalue(), "path": None}]}


def shard(path: Path, rows: list[Row]) -> None:
    """A Parquet file of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, VSFT), path)


def lay_out(root: Path) -> Path:
    """Tiny parts and five rows, under the names and in the formats of the profile's repositories."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=8)
    clip = root / "openai" / "clip-vit-base-patch32"
    config.save_pretrained(clip)
    torch.save(CLIPModel(config).state_dict(), clip / "pytorch_model.bin")
    language = fetch(load_spec("tiny").backbones.language_model, None, 0)
    shutil.copytree(open_artifact(language.files), root / "TinyLlama" / "TinyLlama-1.1B-Chat-v1.0")
    data = root / "HuggingFaceH4" / "llava-instruct-mix-vsft" / "data"
    for number in range(3):
        shard(data / f"train-{number:05}-of-00003-9f3c1e7d2b5a4c68.parquet", [vsft_row(number)])
    shard(data / "test-00000-of-00001-0a1b2c3d4e5f6a7b.parquet", [vsft_row(3), vsft_row(4)])
    return root
