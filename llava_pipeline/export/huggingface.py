"""A checkpoint in the layout that transformers, vLLM and MLX-VLM read.

    model.safetensors         language_model.model.*, language_model.lm_head.weight (where it is not tied),
                              multi_modal_projector.*, vision_tower.vision_model.*
    config.json               LlavaForConditionalGeneration, with old and new names of what was renamed
    generation_config.json    greedy, with every token that ends an answer
    processor_config.json, preprocessor_config.json     letterbox with the mean colour, bicubic, normalise
    tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja

transformers writes a tower without ``vision_model.`` since 5.6, which vLLM and MLX-VLM do not find; it reads both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_pipeline.errors import ExportRefused
from llava_pipeline.evaluation.read import stop_ids
from llava_pipeline.export.folder import write_json
from llava_pipeline.export.precision import precision_of
from llava_pipeline.export.template import exported_template
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.processor import IMAGE_TOKEN
from llava_pipeline.model.tower import shuffled
from llava_pipeline.training.stored import write_tensors

NESTED = ("clip_vision_model", "siglip_vision_model")  # towers that other engines keep in a module `vision_model`
LONGEST_ANSWER = 256
BICUBIC = 3


def write_checkpoint(folder: Path, llava: Llava) -> None:
    """Write the model, its processor and its tokenizer.

    Raises:
        ExportRefused: it is joined in a way that transformers' LLaVA does not have.
    """
    refuse_what_llava_lacks(llava)
    weights = dict(exported_weights(llava))
    dtype = precision_of(weights.values())
    with (folder / "model.safetensors").open("wb") as file:
        stored = {name: weight.to(dtype) for name, weight in weights.items()}
        write_tensors(file, stored, metadata={"format": "pt"})
    write_json(folder / "config.json", configuration(llava, dtype))
    write_json(folder / "generation_config.json", generation(llava))
    images = image_processor(llava)
    write_json(folder / "preprocessor_config.json", images | {"processor_class": "LlavaProcessor"})
    write_json(folder / "processor_config.json", processor(llava) | {"image_processor": images})
    write_tokenizer(folder, llava)


def refuse_what_llava_lacks(llava: Llava) -> None:
    """Raises ExportRefused where more happens to features than other engines' LLaVA knows."""
    if (r := shuffled(llava.model.config)) > 1:
        raise ExportRefused(
            f"{r} x {r} patches are joined to one token (model.pixel_shuffle={r}), which other engines' LLaVA does not "
            "do; train with --set model.pixel_shuffle=1 to export"
        )


def exported_weights(llava: Llava) -> Iterator[tuple[str, Tensor]]:
    """Every weight under the name that all engines know; tied ones once."""
    model = llava.model
    prefix = "vision_tower."
    if model.config.vision_config.model_type in NESTED:
        prefix += "vision_model."
    parts = (
        ("language_model.model.", model.model.language_model),
        ("multi_modal_projector.", model.model.multi_modal_projector),
        (prefix, model.model.vision_tower),
    )
    for start, part in parts:
        for name, weight in part.named_parameters():
            yield start + (name.removeprefix("vision_model.") if part is model.model.vision_tower else name), weight
    if not model.config.tie_word_embeddings:
        yield "language_model.lm_head.weight", model.lm_head.weight


def configuration(llava: Llava, dtype: torch.dtype) -> dict[str, Any]:
    """config.json: names of today, and of readers that know older ones."""
    config = llava.model.config
    found: dict[str, Any] = config.to_dict()
    name = str(dtype).removeprefix("torch.")
    for part in (found, found["text_config"], found["vision_config"]):
        for key in ("_name_or_path", "transformers_version", "_attn_implementation_autoset"):
            part.pop(key, None)
        part |= {"dtype": name, "torch_dtype": name}
    text = found["text_config"]
    rope = text.get("rope_parameters") or {}
    if "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    text |= {"head_dim": head_dim(config.text_config), "tie_word_embeddings": bool(config.tie_word_embeddings)}
    return found | {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": llava.processor.image_token_id,
        "image_seq_length": llava.processor.num_image_tokens,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }


def head_dim(text: Any) -> int:
    """Width of an attention head, stated or not."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def generation(llava: Llava) -> dict[str, Any]:
    """Greedy, as it is evaluated; an answer ends with any of the tokens that end one here."""
    tokenizer, ends = llava.processor.tokenizer, sorted(stop_ids(llava))
    return {
        "do_sample": False,
        "max_new_tokens": LONGEST_ANSWER,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
    } | ({} if tokenizer.bos_token_id is None else {"bos_token_id": tokenizer.bos_token_id})


def image_processor(llava: Llava) -> dict[str, Any]:
    """What is done to a picture here, in the words of transformers; the crop of a square changes nothing."""
    images = llava.processor.images
    side = {"height": images.side, "width": images.side}
    return {
        "image_processor_type": "LlavaImageProcessor",
        "do_convert_rgb": True, "do_pad": True, "do_resize": True, "size": side, "resample": BICUBIC,
        "do_center_crop": True, "crop_size": side, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(images.mean), "image_std": list(images.std),
    }  # fmt: skip


def processor(llava: Llava) -> dict[str, Any]:
    """How many tokens stand for a picture, in the words of transformers."""
    strategy = llava.model.config.vision_feature_select_strategy
    patch = llava.model.config.vision_config.patch_size
    features = llava.processor.num_image_tokens + (1 if strategy == "default" else 0)
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": patch,
        "num_additional_image_tokens": features - (llava.processor.images.side // patch) ** 2,
        "vision_feature_select_strategy": strategy,
    }


def write_tokenizer(folder: Path, llava: Llava) -> None:
    """The tokenizer as it is here, with names of files and keys that readers before transformers 5 know too."""
    tokenizer, template = llava.processor.tokenizer, exported_template(llava.processor.template)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    others = [token for token in llava.processor.special_tokens if token not in named.values()]
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in others}
    special = named | {"additional_special_tokens": sorted(others, key=lambda token: ids[token])}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # all that it is stands in tokenizer.json
        "processor_class": "LlavaProcessor",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(llava.model.config.text_config.max_position_embeddings),
        "padding_side": "left",
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", about | special)
    write_json(folder / "special_tokens_map.json", special)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
