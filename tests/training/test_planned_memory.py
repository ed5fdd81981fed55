"""What a plan says of a step's memory, held to what the step keeps."""

from __future__ import annotations

import pytest
import torch

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import Backbones
from llava_pipeline.model.assemble import assemble
from llava_pipeline.model.freeze import let_learn
from llava_pipeline.model.memory import LAST_LAYER, per_layer_bytes
from llava_pipeline.spec import load_spec
from llava_pipeline.training.step import make_step
from tests.tiny import features_of, samples_of

LAYERS = 6
MODEL = (
    "backbones.language_model={kind: random, like: pocket/language_model, overrides: {hidden_size: 256, "
    f"intermediate_size: 704, num_hidden_layers: {LAYERS}, num_attention_heads: 4, num_key_value_heads: 2, "
    "head_dim: 64}}"
)


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_a_token_leaves_as_much_for_the_way_back_as_is_planned(mode: str) -> None:
    spec = load_spec("tiny", [MODEL, f"training.language_model={{mode: {mode}}}"])
    parts = spec.backbones
    backbones = Backbones(
        vision_tower=fetch(parts.vision_tower, None, 0), language_model=fetch(parts.language_model, None, 0)
    )
    llava = assemble(backbones, spec.model)
    let_learn(llava.model, spec.training)
    samples, features = samples_of(llava), features_of(llava)
    alone = spec.training.step.model_copy(update={"share_picture": False})  # the same sample many times
    step = make_step(llava.model, samples, lambda images: features[images], torch.float32, alone)
    weights = {parameter.untyped_storage().data_ptr() for parameter in llava.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    indices = [len(samples) - 1] * 8  # of one length, so that nothing is padded
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = step.loss(indices)
    assert loss.requires_grad
    tokens = samples.num_tokens(indices) - len(indices) * getattr(step, "num_prefix", 0)
    layers = LAYERS - (LAST_LAYER if mode != "full" else 0)
    planned = tokens * layers * per_layer_bytes(llava.model.config.text_config, 4, spec.training)
    assert sum(kept.values()) == pytest.approx(planned, rel=0.15)
