from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backbones.hub import Hub, running_hub

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store."""
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one small language model, an empty cache, and nobody logged in."""
    import huggingface_hub

    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add("owner/name", REVISION, repository_files())
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


def repository_files() -> dict[str, bytes]:
    """A language model's repository: weights in several formats, of which one is wanted, and files that are not."""
    return {
        "config.json": json.dumps({"model_type": "llama"}).encode(),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b'{"a": 1}',
        "model.safetensors": bytes(range(256)) * 40,
        "pytorch_model.bin": b"the same weights in another format",
        "README.md": b"not needed",
    }
