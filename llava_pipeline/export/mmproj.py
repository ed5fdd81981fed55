"""The vision tower and the projector as the second GGUF that llama.cpp reads beside the language model.

llama.cpp's own converter refuses CLIP; its runtime takes CLIP with a projector of two layers (``mlp``), and misplaces
the class token, which ``class_token`` sets right. Its graph does not run the last block, though it wants its weights:
so one block follows those that are run. ``post_layernorm`` would be applied if it were there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGUFWriter, LlamaFileType

from llava_pipeline.errors import ExportRefused
from llava_pipeline.export.class_token import EPSILON, LOUD, PIXELS, Sizes, State, turned
from llava_pipeline.export.gguf_text import add_weight, finish
from llava_pipeline.export.huggingface import refuse_what_llava_lacks
from llava_pipeline.model.assemble import Llava

ACTIVATIONS = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}  # whether it is llama.cpp's gelu
_EXACT = ("v.blk.0.", "v.position_embd.", "mm.0.")  # numbers that 16 bits do not hold
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
_EMBEDDINGS = {
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
}
_BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out", "layer_norm1": "ln1", "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip
_PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}


@dataclass(frozen=True, slots=True)
class Tower:
    """A tower as llama.cpp gets it: weights by their names there, sizes, how faint its pixels are, how loud it is."""

    weights: State
    blocks: int
    width: int
    heads: int
    epsilon: float
    pixels: float
    loud: float


def write_mmproj(path: Path, llava: Llava, name: str, licence: str) -> None:
    """Write tower and projector, matrices in 16 bits.

    Raises:
        ExportRefused: llama.cpp cannot represent them; the message says what and why.
    """
    refuse_what_llama_cpp_lacks(llava)
    config, vision = llava.model.config, llava.model.config.vision_config
    images = llava.processor.images
    writer = GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(name)
    writer.add_license(licence)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    tower = tower_of(llava)
    writer.add_vision_embedding_length(tower.width)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_block_count(tower.blocks)
    writer.add_vision_head_count(tower.heads)
    writer.add_vision_attention_layernorm_eps(tower.epsilon)
    writer.add_vision_image_mean(list(images.mean))
    writer.add_vision_image_std([deviation / tower.pixels for deviation in images.std])
    writer.add_vision_use_gelu(ACTIVATIONS[vision.hidden_act])
    for key, weight in (tower.weights | projector_of(llava, tower)).items():
        if key.startswith(_EXACT):
            writer.add_tensor(key, np.ascontiguousarray(weight.detach().float().cpu().numpy()))
        else:
            add_weight(writer, key, weight)
    finish(writer)


def refuse_what_llama_cpp_lacks(llava: Llava) -> None:
    """Raises ExportRefused where llama.cpp would not give the features that this tower and projector give."""
    refuse_what_llava_lacks(llava)
    config, vision = llava.model.config, llava.model.config.vision_config
    if vision.model_type not in (CLIP, SIGLIP):
        raise ExportRefused(
            f"the vision tower is a {vision.model_type}; of LLaVA's towers llama.cpp reads CLIP and SigLIP; use --to hf"
        )
    if vision.model_type == CLIP and config.vision_feature_select_strategy != "default":
        raise ExportRefused(
            "the class token is projected too (model.vision_feature_select_strategy=full), which llama.cpp drops; "
            "use --to hf"
        )
    if vision.model_type == CLIP and vision.intermediate_size < 2 * vision.hidden_size:
        raise ExportRefused(
            f"the tower's blocks have {vision.intermediate_size} hidden units for {vision.hidden_size} channels; a "
            "CLIP tower for llama.cpp needs twice as many; use --to hf"
        )
    if config.projector_hidden_act != "gelu" or vision.hidden_act not in ACTIVATIONS:
        raise ExportRefused(
            f"the tower has {vision.hidden_act} and the projector {config.projector_hidden_act}; llama.cpp has "
            f"{', '.join(ACTIVATIONS)} in towers and gelu in projectors; use --to hf"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise ExportRefused("several layers of the tower are projected, of which llama.cpp has one; use --to hf")


def tower_of(llava: Llava) -> Tower:
    """The tower by llama.cpp's names; its own blocks are those that what is projected has passed, and one more."""
    config, vision = llava.model.config, llava.model.config.vision_config
    blocks = int(vision.num_hidden_layers + config.vision_feature_layer + 1)
    named = llava.model.model.vision_tower.named_parameters()
    own = {name.removeprefix("vision_model."): weight.detach().float().cpu() for name, weight in named}
    if vision.model_type == CLIP:
        sizes = Sizes(vision.hidden_size, vision.num_attention_heads, llava.processor.num_image_tokens, blocks)
        weights, count, first = turned(own, sizes), blocks + 1, "v.blk.0."
        tower = Tower(weights, count + 1, sizes.whole, sizes.heads + 1, EPSILON, PIXELS, LOUD)
    else:
        weights, count, first = plain(own, blocks), blocks, "v.blk.0."
        tower = Tower(
            weights, count + 1, vision.hidden_size, vision.num_attention_heads, vision.layer_norm_eps, 1.0, 1.0
        )
    last = {key.replace(first, f"v.blk.{count}."): weight for key, weight in weights.items() if key.startswith(first)}
    weights.update(last)  # it is not run
    return tower


def plain(own: State, blocks: int) -> State:
    """A tower without a class token as it is."""
    found = {key: own[name] for name, key in _EMBEDDINGS.items()}
    for number in range(max(blocks, 1)):
        for module, key in _BLOCK.items():
            for kind in ("weight", "bias"):
                found[f"v.blk.{number}.{key}.{kind}"] = own[f"encoder.layers.{number}.{module}.{kind}"]
    return found


def projector_of(llava: Llava, tower: Tower) -> State:
    """The projector by llama.cpp's names; it reads as many channels as the tower has there, as loud as they are."""
    found: State = {}
    for name, weight in llava.model.model.multi_modal_projector.named_parameters():
        module, _, kind = name.rpartition(".")
        if name == "linear_1.weight":
            weight = torch.cat([weight.detach(), weight.new_zeros(len(weight), tower.width - weight.shape[1])], 1)
            weight = weight / tower.loud
        found[f"{_PROJECTOR[module]}.{kind}"] = weight.detach()
    return found
