"""The vision tower and the projector as the second GGUF that llama.cpp reads beside the language model.

llama.cpp's own converter refuses CLIP; its runtime takes CLIP with a projector of two layers (``mlp``), and misplaces the
class token, which ``class_token`` sets right. Its graph does not run the last block, though it wants its weights: so one
block follows those that are run. ``post_layernorm`` would be applied if it were there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGUFWriter, LlamaFileType
from torch import Tensor

from llava_pipeline.errors import ExportRefused
from llava_pipeline.export.class_token import EPSILON, LOUD, PIXELS, Sizes, turned
from llava_pipeline.export.gguf_text import add_weight, finish
from llava_pipeline.model.assemble import Llava

ACTIVATIONS = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}  # whether it is llama.cpp's gelu
_EXACT = ("v.blk.0.", "v.position_embd.", "mm.0.")  # numbers that 16 bits do not hold
_PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}


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
    sizes = sizes_of(llava)
    writer.add_vision_embedding_length(sizes.whole)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_block_count(sizes.blocks + 2)
    writer.add_vision_head_count(sizes.heads + 1)
    writer.add_vision_attention_layernorm_eps(EPSILON)
    writer.add_vision_image_mean(list(images.mean))
    writer.add_vision_image_std([deviation / PIXELS for deviation in images.std])
    writer.add_vision_use_gelu(ACTIVATIONS[vision.hidden_act])
    for key, weight in _weights(llava, sizes):
        if key.startswith(_EXACT):
            writer.add_tensor(key, np.ascontiguousarray(weight.detach().float().cpu().numpy()))
        else:
            add_weight(writer, key, weight)
    finish(writer)


def refuse_what_llama_cpp_lacks(llava: Llava) -> None:
    """Raises ExportRefused where llama.cpp would not give the features that this tower and projector give."""
    config, vision = llava.model.config, llava.model.config.vision_config
    if vision.model_type != "clip_vision_model":
        raise ExportRefused(
            f"the vision tower is a {vision.model_type}; llama.cpp's LLaVA reads CLIP towers alone; use --to hf"
        )
    if config.vision_feature_select_strategy != "default":
        raise ExportRefused(
            "the class token is projected too (model.vision_feature_select_strategy=full), which llama.cpp drops; "
            "use --to hf"
        )
    if config.projector_hidden_act != "gelu" or vision.hidden_act not in ACTIVATIONS:
        raise ExportRefused(
            f"the tower has {vision.hidden_act} and the projector {config.projector_hidden_act}; llama.cpp has "
            f"{', '.join(ACTIVATIONS)} in towers and gelu in projectors; use --to hf"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise ExportRefused("several layers of the tower are projected, of which llama.cpp has one; use --to hf")


def sizes_of(llava: Llava) -> Sizes:
    """Sizes of the tower; its blocks are those that what is projected has passed."""
    config, vision = llava.model.config, llava.model.config.vision_config
    blocks = int(vision.num_hidden_layers + config.vision_feature_layer + 1)
    return Sizes(vision.hidden_size, vision.num_attention_heads, llava.processor.num_image_tokens, blocks)


def _weights(llava: Llava, sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """Tower and projector by llama.cpp's names."""
    named = llava.model.model.vision_tower.named_parameters()
    tower = {name.removeprefix("vision_model."): weight.detach().float().cpu() for name, weight in named}
    written = turned(tower, sizes)
    yield from written.items()
    for key in [key for key in written if key.startswith("v.blk.0.")]:  # a last one, which is not run
        yield key.replace("blk.0", f"blk.{sizes.blocks + 1}"), written[key]
    for name, weight in llava.model.model.multi_modal_projector.named_parameters():
        module, _, kind = name.rpartition(".")
        if name == "linear_1.weight":
            weight = torch.cat([weight.detach(), weight.new_zeros(len(weight), sizes.more)], 1) / LOUD
        yield f"{_PROJECTOR[module]}.{kind}", weight
