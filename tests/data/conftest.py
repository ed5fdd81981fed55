from __future__ import annotations

from pathlib import Path

import pytest

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import Backbones
from llava_pipeline.model.assemble import assemble
from llava_pipeline.model.processor import Processor
from llava_pipeline.spec import load_spec


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """Tokenizer, template and image settings of the tiny profile."""
    spec = load_spec("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path_factory.mktemp("home")))
        parts = {name: fetch(getattr(spec.backbones, name), None, 0) for name in ("vision_tower", "language_model")}
        return assemble(Backbones(**parts), spec.model).processor


@pytest.fixture
def mute(processor: Processor) -> Processor:
    """The same with a template that marks nothing as to be learned."""
    template = processor.template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return Processor(processor.tokenizer, template, processor.images, processor.num_image_tokens)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store."""
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
